"""A classifier that trains on the image features: against plain torch loops, and through the other commands."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tracer.data.batches import TrainingBatches
from tracer.data.build import read_index
from tracer.errors import UserError
from tracer.evaluation.config import EvaluateConfig
from tracer.evaluation.evaluate import evaluate
from tracer.models.clip import load_clip
from tracer.models.heads import START_HEAD, class_head
from tracer.train.config import Config
from tracer.train.finished import WiseConfig, average
from tracer.train.log import read_log
from tracer.train.run import finetune


def zero_shot(clip, classes):
    """σ times the normalised features of each class's prompt, by hand."""
    texts = [f"a photo of a {name}" for name in classes]
    with torch.no_grad():
        features = clip.model.eval().encode_text(clip.tokenizer(texts))
    return clip.model.logit_scale.exp() * features / features.norm(dim=1, keepdim=True)


def factor(step, steps, warmup):
    """The rate of step 0, 1, …: linear warm-up from 1/warmup, then a cosine to 0."""
    if step < warmup:
        return (1 + (warmup - 1) * step / warmup) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@pytest.mark.parametrize(
    ("kind", "parts"), [("probe", 16), ("whole", 16), ("probe-first", 16), ("whole", 7), ("probe-first", 7)]
)
def test_a_classifier_equals_a_plain_torch_loop(config, kind, parts):
    """As a whole batch, and in micro-batches of 6, 5 and 5 pictures."""
    config = dataclasses.replace(
        config,
        method="flyp",
        classifier=kind,
        clip_grad=0.0,
        steps=8,
        warmup=1,
        eval_data={},
        micro_batch=parts,
    )
    folder = finetune(config)
    student, log = load_file(folder / "student.safetensors"), read_log(folder)
    clip, index = load_clip(config.model, config.pretrained), read_index(config.train_data)
    start = {name: value.clone() for name, value in clip.model.state_dict().items()}
    head = zero_shot(clip, index.classes).detach().clone().requires_grad_()
    towers = [p for n, p in clip.model.named_parameters() if n.startswith("visual.")]
    decay = config.recipe.weight_decay
    groups = [
        {"params": [p for p in towers if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in towers if p.ndim < 2], "weight_decay": 0.0},
        {"params": [head], "weight_decay": decay},
    ]
    adam = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6)
    options = {"batch_size": 16, "steps": 8, "seed": 0, "crop_scale": config.crop_scale}
    losses = []
    for p in (
        towers
    ):  # DeepSpeed's stage 1 gives them zeros while the classifier trains alone: Adam counts the steps
        p.grad = torch.zeros_like(p)
    clip.model.train()
    for step, batch in enumerate(TrainingBatches(index, clip, **options)):
        half = kind == "probe-first"
        alone = kind == "probe" or (half and step < 4)
        rate = config.lr * (factor(step % 4, 4, 1) if half else factor(step, 8, 1))
        u = clip.model.encode_image(batch.image)
        logits = (u / u.norm(dim=1, keepdim=True)) @ head.T
        loss = -logits.log_softmax(1)[torch.arange(16), batch.label].mean()
        for group, own in zip(adam.param_groups, (not alone, not alone, True), strict=True):
            group["lr"] = rate if own else 0.0
        adam.zero_grad(set_to_none=False)
        loss.backward(inputs=[head] if alone else [head, *towers])
        adam.step()
        losses.append(loss.item())
    assert [row["loss"] for row in log] == pytest.approx(losses, rel=2e-3)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(student.pop("class_head.weight"), head.detach(), rtol=2e-3, atol=2e-3)
    assert bytes(student.pop("class_head.names").tolist()).decode() == json.dumps(index.classes)
    for name, value in student.items():
        if name.startswith("visual.") and kind != "probe":
            torch.testing.assert_close(value, clip.model.state_dict()[name], rtol=2e-3, atol=2e-3)
        else:  # bit for bit
            assert torch.equal(value, start[name]), name
    assert any(not torch.equal(v, start[n]) for n, v in student.items()) == (kind != "probe")


@pytest.fixture(scope="module")
def probed(tiny_config, drawings, tmp_path_factory) -> Config:
    """The settings of a finished linear probe."""
    folder = tmp_path_factory.mktemp("probed")
    config = Config(
        train_data=drawings / "train.csv", eval_data={"test": drawings / "test.csv"}, model=str(tiny_config),
        pretrained=None, output=folder / "run", cache=folder / "cache", steps=3, batch_size=16, warmup=0,
        lr=0.5, precision="fp32", baseline="linear-probe",
    )  # fmt: skip
    finetune(config)
    return config


def test_a_run_begins_with_the_zero_shot_scores_and_evaluate_repeats_its_own(probed):
    scores = json.loads((probed.output / "metrics.json").read_text())["scores"]
    clip = load_clip("auto", str(probed.output))
    head = class_head(clip.model)
    start = load_file(probed.output / START_HEAD)["class_head.weight"]
    expected = zero_shot(clip, head.classes).detach()  # the text tower is still that of the start
    torch.testing.assert_close(start, expected)
    assert not torch.allclose(head.weight.detach(), start, atol=0.1)
    own = evaluate(
        EvaluateConfig(eval_data=probed.eval_data, pretrained=str(probed.output), cache=probed.cache)
    )
    assert own["test"]["nll"] == pytest.approx(scores["student"]["test"]["nll"])
    assert own["test"]["nll"] != pytest.approx(scores["zero-shot"]["test"]["nll"], rel=1e-3)
    # the score is that of u Wᵀ
    index, options = read_index(probed.eval_data["test"]), {"steps": 1, "seed": 0, "crop_scale": 1.0}
    assert index.classes == head.classes
    del options
    from tracer.data.decoded import DecodedPictures

    ((images, _),) = DecodedPictures(0).batches(
        index, clip.picture_format, len(index), 1, torch.device("cpu")
    )
    with torch.no_grad():
        logits = F.normalize(clip.model.eval().encode_image(images), dim=1) @ head.weight.T
    truth = torch.from_numpy(index.label_numbers)
    assert own["test"]["nll"] == pytest.approx(float(F.cross_entropy(logits, truth)), rel=1e-4)


def test_wise_ft_averages_the_classifier_with_that_of_the_start(probed, tmp_path):
    path = average(WiseConfig("start", probed.output, 0.25, tmp_path / "wise.safetensors"))
    mixed = load_file(path)["class_head.weight"]
    end = load_file(probed.output / "student.safetensors")["class_head.weight"]
    start = load_file(probed.output / START_HEAD)["class_head.weight"]
    torch.testing.assert_close(mixed, 0.75 * start + 0.25 * end)
    plain = tmp_path / "plain.safetensors"
    average(WiseConfig("start", probed.output, 0.25, plain))
    from tracer.models.weights import read_weights, save_weights

    towers, alone = read_weights(plain), tmp_path / "towers.safetensors"
    assert not any(name.startswith("class_head") for name in towers)
    save_weights(towers, alone, load_clip("auto", str(probed.output)).architecture.metadata())
    with pytest.raises(UserError, match=r"has a classifier beside its towers, and '.*' has none"):
        average(WiseConfig(alone, probed.output, 0.5, tmp_path / "no.safetensors"))


def test_another_method_starts_from_the_towers_alone(probed, tmp_path):
    changes = {
        "baseline": None,
        "classifier": "none",
        "lr": 1e-3,
        "eval_data": {},
        "output": tmp_path / "run",
    }
    folder = finetune(
        dataclasses.replace(probed, pretrained=str(probed.output), method="flyp", steps=1, **changes)
    )
    assert not any(name.startswith("class_head") for name in load_file(folder / "student.safetensors"))
    assert not (folder / START_HEAD).exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "tracer"}, "--classifier whole takes the place of the contrastive loss, and has neither"),
        ({"zero_stage": 3}, "--classifier needs its weights whole: leave out --zero_stage 3"),
        ({"classes": True}, "the class 'bar' of --train_data has no prompts in --classes: add them"),
    ],
)
def test_what_a_classifier_cannot_do_is_one_line(config, changes, says, tmp_path, monkeypatch):
    if "classes" in changes:  # before a model is loaded
        monkeypatch.setattr("tracer.train.run.load_clip", lambda *_: pytest.fail("a model was loaded"))
        changes = {"classes": tmp_path / "classes.json", "eval_data": {}}
        changes["classes"].write_text('{"circle": ["a circle"], "square": ["a square"]}')
    with pytest.raises(UserError, match=says):
        finetune(dataclasses.replace(config, **{"method": "flyp", "classifier": "whole"} | changes))


def test_a_set_with_other_classes_is_refused(probed, tmp_path):
    classes = tmp_path / "classes.json"
    classes.write_text('{"circle": ["a"], "square": ["b"], "cross": ["c"], "bar": ["d"], "star": ["e"]}')
    with pytest.raises(
        UserError, match="these weights have a classifier of 4 classes, and 'star' is not one"
    ):
        evaluate(
            EvaluateConfig(
                eval_data=probed.eval_data, pretrained=str(probed.output), classes=classes, cache=probed.cache
            )
        )
