"""Fine-tuning with the sigmoid of each pair: what the checkpoint says, and what the settings change."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tracer.data.batches import TrainingBatches
from tracer.data.build import read_index
from tracer.errors import UserError
from tracer.evaluation.config import EvaluateConfig
from tracer.evaluation.evaluate import evaluate
from tracer.evaluation.sets import EvaluationSet
from tracer.evaluation.zero_shot import classifier, predict
from tracer.files import write_tensors
from tracer.models.architecture import Form, saved_architecture
from tracer.models.clip import encode, load_clip
from tracer.models.weights import save_weights
from tracer.ops import contrastive_loss
from tracer.train.config import Config
from tracer.train.finished import FoldConfig, WiseConfig, average, fold_again
from tracer.train.identity import is_run_of
from tracer.train.log import read_log
from tracer.train.loop import Trainer, objective
from tracer.train.run import finetune, prepare

SCALE = 117.0  # above the bound of CLIP's models, as SigLIP's published weights are


@pytest.fixture
def siglip(config, tiny_config, tmp_path) -> Config:
    """The small run, of a model with a logit bias."""
    made_for = json.loads(tiny_config.read_text()) | {
        "init_logit_scale": math.log(SCALE),
        "init_logit_bias": -8.0,
    }
    path = tmp_path / "tiny-pairs.json"
    path.write_text(json.dumps(made_for))
    torch.manual_seed(0)
    start = tmp_path / "siglip.safetensors"
    save_weights(load_clip(str(path), None).model.state_dict(), start)
    return dataclasses.replace(config, model=str(path), pretrained=str(start), steps=2, warmup=1)


def one_step(config: Config) -> tuple[dict, dict[str, Tensor]]:
    """Return what the first step logs, and the loss's arguments on its batch."""
    clip = load_clip(config.model, config.pretrained)
    prepare(config, clip.model)
    options = {"batch_size": config.batch_size, "seed": 0, "crop_scale": 0.9, "steps": 1}
    batch = next(iter(TrainingBatches(read_index(config.train_data), clip, **options)))
    names = ("image", "text", "logit_scale", "logit_bias")
    with torch.no_grad():
        features = dict(
            zip(names, map(torch.clone, encode(clip.model, batch.image, batch.text)), strict=False)
        )
    trainer = Trainer(config, clip.model)
    logged = trainer.step(1, islice([batch], 1), False)
    trainer.engine.destroy()
    return logged, features | {"labels": batch.label}


@pytest.mark.parametrize(
    ("changes", "bias"),
    [({}, -8.0), ({"logit_bias": -3.0}, -3.0), ({"micro_batch": 5}, -8.0), ({"contrast": "sigmoid"}, -8.0)],
    ids=str,
)
def test_a_model_with_a_bias_trains_with_the_sigmoid(siglip, changes, bias):
    logged, arguments = one_step(dataclasses.replace(siglip, method="flyp", **changes))
    assert logged["logit_scale"] == pytest.approx(SCALE)
    assert logged["logit_bias"] == arguments["logit_bias"] == bias
    expected = contrastive_loss(**arguments, contrast="sigmoid", impl="eager").loss
    assert float(logged["loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_the_softmax_on_request(siglip):
    logged, arguments = one_step(dataclasses.replace(siglip, method="flyp", contrast="softmax"))
    arguments.pop("logit_bias")
    assert float(logged["loss"]) == pytest.approx(float(contrastive_loss(**arguments).loss), rel=1e-4)


@pytest.mark.parametrize(("given", "bias"), [(None, -10.0), (-2.0, -2.0)])
def test_a_model_without_a_bias_takes_the_settings(config, given, bias):
    config = dataclasses.replace(config, method="flyp", contrast="sigmoid", logit_bias=given)
    logged, arguments = one_step(config)
    expected = contrastive_loss(**arguments, contrast="sigmoid", logit_bias=bias, impl="eager").loss
    assert float(logged["loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_distillation_takes_the_teachers_bias(siglip):
    """At the first step the teacher is the student, so that their divergence is 0; CRD is of pairs."""
    logged, _ = one_step(siglip)
    assert float(logged["relational"].detach()) == pytest.approx(0.0, abs=1e-5)
    assert logged["interactive"] > 0


def test_a_whole_run(siglip):
    """Scale and bias train, are saved without CLIP's bound, and the settings can be read back."""
    run = finetune(dataclasses.replace(siglip, method="r-adapter", logit_bias=-6.0))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["contrast"], settings["logit_bias"]) == (None, -6.0)
    assert (
        float(load_file(run / "student.safetensors")["logit_bias"]) == -6.0
    )  # not the start's, which is frozen
    model = load_clip(siglip.model, siglip.pretrained).model
    kept = {name: settings[name] for name in ("method", "smoothing", "contrast")}
    objective(Config(train_data=siglip.train_data, **kept), model)
    run = finetune(dataclasses.replace(siglip, output=siglip.output.with_name("full")))
    student, start = load_file(run / "student.safetensors"), load_file(siglip.pretrained)
    assert student["logit_scale"].exp() > 100.5
    for name in ("logit_scale", "logit_bias"):
        assert student[name] != start[name]
    assert read_log(run)[-1]["logit_bias"] != -8.0
    assert 0 <= json.loads((run / "metrics.json").read_text())["scores"]["student"]["test"]["ece"] <= 1


@pytest.mark.parametrize(
    ("biased", "changes", "message"),
    [
        (True, {"smoothing": 0.1}, "--smoothing 0.1 has no meaning for the sigmoid.*--contrast softmax"),
        (False, {"logit_bias": -5.0}, "--logit_bias -5.0 changes no softmax.*--contrast sigmoid"),
        (True, {"logit_bias": -5.0, "contrast": "softmax"}, "--logit_bias -5.0 changes no softmax"),
        (False, {"smoothing": 0.1, "contrast": "sigmoid"}, "--smoothing 0.1 has no meaning"),
        # The number that r-adapter publishes for its softmaxes, chosen by the user.
        (True, {"smoothing": 0.05, "method": "r-adapter"}, "--smoothing 0.05 has no meaning"),
    ],
    ids=str,
)
def test_settings_without_a_meaning_are_refused(config, siglip, biased, changes, message):
    chosen = siglip if biased else config
    model = load_clip(chosen.model, chosen.pretrained).model
    with pytest.raises(UserError, match=message):
        objective(dataclasses.replace(chosen, **changes), model)


def test_a_bias_is_a_number():
    with pytest.raises(UserError, match="--logit_bias is nan: it must be a finite number"):
        Config(train_data=None, logit_bias=math.nan).validate()


def test_zero_shot_probabilities_are_those_of_each_pair(siglip, drawings):
    """sigmoid(σ cosine + b), σ beyond CLIP's bound; the largest class is the same."""
    clip, index = load_clip(siglip.model, siglip.pretrained), read_index(drawings / "test.csv")
    weights = classifier(clip, {name: [f"a {name}"] for name in index.classes})
    each = EvaluationSet(index, prompts={name: [f"a {name}"] for name in index.classes})
    got = predict(clip, each, weights)
    images = torch.stack(clip_images(clip, index))
    with torch.no_grad():
        cosine = clip.model.encode_image(images, normalize=True) @ weights.T
    best, predicted = (SCALE * cosine - 8.0).max(1)
    assert got.predicted.tolist() == predicted.tolist()
    torch.testing.assert_close(torch.from_numpy(got.confidence), best.sigmoid(), rtol=1e-4, atol=1e-6)
    own = (SCALE * cosine - 8.0)[torch.arange(len(index)), torch.from_numpy(each.truth)]
    torch.testing.assert_close(torch.from_numpy(got.nll), -own.sigmoid().log(), rtol=1e-4, atol=1e-5)


def scores_of(config: Config, pretrained: Path | str, model: str = "auto") -> dict:
    """Return what ``tracer evaluate`` says of weights on the run's test set."""
    sets = {name: str(path) for name, path in config.eval_data.items()}
    return evaluate(EvaluateConfig(eval_data=sets, pretrained=str(pretrained), model=model))["test"]


def assert_same(a: dict, b: dict) -> None:
    for measure in ("accuracy", "nll", "ece"):
        assert a[measure] == pytest.approx(b[measure], rel=1e-5), measure


def short(config: Config, name: str, **changes) -> Config:
    folder = config.output.with_name(name)
    return dataclasses.replace(config, output=folder, steps=1, warmup=0, lr=1e-4, **changes)


def trained(config: Config) -> tuple[Path, dict]:
    """Return the folder of a run, and the scores of its models on the test set at its end."""
    run = finetune(config)
    scores = json.loads((run / "metrics.json").read_text())["scores"]
    return run, {model: sets["test"] for model, sets in scores.items()}


def header(path: Path) -> Form | None:
    saved = saved_architecture(path)
    return saved and saved.form


def test_weights_are_evaluated_by_the_form_that_they_were_trained_with(config):
    """A model without a bias: its files keep the fixed b. The start, a softmax's, is scored as such."""
    kept = {"eval_every": 1, "keep_best": "test"}
    run, scores = trained(short(config, "pairs", method="flyp", contrast="sigmoid", logit_bias=-3.0, **kept))
    for name in ("student", "best"):
        assert header(run / f"{name}.safetensors") == Form("sigmoid", -3.0), name
        assert_same(scores_of(config, run / f"{name}.safetensors"), scores[name])
    assert_same(scores_of(config, run), scores["student"])
    assert read_log(run)[-1]["eval/student/test/ece"] == pytest.approx(scores["student"]["ece"])
    assert_same(scores_of(config, config.pretrained, config.model), scores["zero-shot"])
    clip = load_clip("auto", str(run))
    assert (clip.form, clip.logit_bias) == (Form("sigmoid", -3.0), -3.0)
    softmax = dataclasses.replace(clip, trained_with=Form("softmax"))
    index = read_index(config.eval_data["test"])
    each = EvaluationSet(index, prompts={name: [name] for name in index.classes})
    weights = classifier(clip, each.prompts)
    confidence = [torch.from_numpy(predict(c, each, weights).confidence) for c in (clip, softmax)]
    assert not torch.allclose(*confidence)


def test_a_run_takes_up_the_form_of_its_start(config):
    """Unless it is told otherwise. Its settings say what was asked; an average keeps the form, or is refused."""
    first, scores = trained(short(config, "pairs", method="flyp", contrast="sigmoid", logit_bias=-3.0))
    start = str(first / "student.safetensors")
    asked = short(config, "again", method="flyp", pretrained=start)
    again, later = trained(asked)
    assert header(again / "student.safetensors") == Form("sigmoid", -3.0)
    assert_same(later["zero-shot"], scores["student"])
    assert yaml.safe_load((again / "config.yaml").read_text())["contrast"] is None
    assert is_run_of(asked, again)
    back, later = trained(short(config, "back", method="flyp", pretrained=start, contrast="softmax"))
    assert header(back / "student.safetensors") == Form("softmax")
    assert_same(later["zero-shot"], scores["student"])
    with pytest.raises(
        UserError, match=r"with the sigmoid with a bias of -3 .* with the softmax: .* neither"
    ):
        average(WiseConfig(first, back, output=config.output.with_name("mixed.safetensors")))
    path = average(WiseConfig(Path("start"), first, output=config.output.with_name("wise.safetensors")))
    assert header(path) == Form("sigmoid", -3.0)


def test_a_siglip_model_trained_with_softmaxes_is_evaluated_with_them(siglip):
    run, scores = trained(short(siglip, "softmaxes", contrast="softmax", method="flyp"))
    assert header(run / "student.safetensors") == Form("softmax")
    assert_same(scores_of(siglip, run), scores["student"])
    clip = load_clip("auto", str(run))
    as_made = dataclasses.replace(clip, trained_with=None)
    assert (clip.logit_bias, as_made.form) == (0.0, Form("sigmoid"))


def test_folding_again_keeps_form_and_bias(siglip, config):
    """The bias of the settings is among the weights that adapters are folded into, or in the header."""
    run = finetune(short(siglip, "adapters", method="r-adapter", logit_bias=-6.0, eval_data={}))
    path = fold_again(FoldConfig(run, 0.3))
    assert header(path) == Form("sigmoid")
    assert float(load_file(path)["logit_bias"]) == -6.0
    fixed = {"contrast": "sigmoid", "logit_bias": -6.0, "eval_data": {}}
    run = finetune(short(config, "fixed", method="r-adapter", **fixed))
    assert header(fold_again(FoldConfig(run, 0.3))) == Form("sigmoid", -6.0)


@pytest.mark.parametrize(
    ("strings", "message"),
    [
        ({"contrast": "sigmoid"}, "trained with a sigmoid, but not with which bias"),
        ({"contrast": "tanh"}, "describes no architecture .*contrast is 'tanh'"),
        ({"contrast": "sigmoid", "logit_bias": "nan"}, "logit_bias is nan"),
    ],
)
def test_a_header_without_a_usable_form_is_refused(config, tmp_path, strings, message):
    clip = load_clip(config.model, config.pretrained)
    write_tensors(tmp_path / "w.safetensors", clip.model.state_dict(), clip.architecture.metadata() | strings)
    with pytest.raises(UserError, match=message):
        load_clip(config.model, str(tmp_path / "w.safetensors"))


def clip_images(clip, index) -> list[Tensor]:
    from tracer.data.decoded import DecodedPictures

    batches = DecodedPictures(limit=0).batches(index, clip.picture_format, 16, 2, torch.device("cpu"))
    return [image for images, _ in batches for image in images]
