"""The command ``soup``: each kind against the functions that it calls, and what cannot be mixed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tracer.cli import main
from tracer.errors import UserError
from tracer.evaluation import soup as command
from tracer.evaluation.config import EvaluateConfig, SoupConfig
from tracer.evaluation.evaluate import evaluate
from tracer.evaluation.soup import soup
from tracer.models.architecture import Form
from tracer.models.clip import load_clip
from tracer.models.soups import fisher_weighted, greedy, uniform
from tracer.models.weights import save_weights


@pytest.fixture(scope="module")
def files(tiny_config, tmp_path_factory) -> list[Path]:
    """Weights of three models that differ a little, as runs write them."""
    folder, clip = tmp_path_factory.mktemp("soup"), load_clip(str(tiny_config), None)
    draw, made = torch.Generator().manual_seed(1), []
    for n in range(3):
        state = {
            name: value + 0.3 * torch.randn(value.shape, generator=draw)
            if value.is_floating_point()
            else value
            for name, value in clip.model.state_dict().items()
        }
        made.append(folder / f"{n}.safetensors")
        save_weights(state, made[-1], clip.architecture.metadata())
    return made


def config_of(files, drawings, tmp_path, kind="uniform", **changes) -> SoupConfig:
    validation = None if kind == "uniform" else drawings / "test.csv"
    settings = {
        "output": tmp_path / f"{kind}.safetensors",
        "validation": validation,
        "cache": tmp_path / "cache",
    } | changes
    return SoupConfig(runs=files, kind=kind, workers=1, **settings)


def test_each_kind(files, drawings, tmp_path, capsys):
    models = [load_file(file) for file in files]

    def validate(weights):
        file = tmp_path / "one.safetensors"
        file.unlink(missing_ok=True)
        save_weights(weights, file, load_clip("auto", str(files[0])).architecture.metadata())
        own = EvaluateConfig(
            eval_data={"set": drawings / "test.csv"}, pretrained=str(file), cache=tmp_path / "cache"
        )
        return evaluate(own)["set"]["accuracy"]

    best, chosen = greedy(models, validate)
    want = {"uniform": uniform(models), "greedy": best}
    for kind, weights in want.items():
        got = load_file(soup(config_of(files, drawings, tmp_path, kind)))
        assert got.keys() == weights.keys()
        assert all(torch.equal(got[name], value) for name, value in weights.items()), kind
    names = ", ".join(str(files[n]) for n in chosen)
    assert f"the greedy soup holds {names}; its accuracy on --validation is {validate(best):.4f}" in (
        capsys.readouterr().err
    )
    made = load_clip("auto", str(tmp_path / "greedy.safetensors"))
    assert made.name == "tiny-clip"  # it says what it is


def test_fisher_weights_are_those_of_the_validation_pictures(files, drawings, tmp_path, monkeypatch):
    seen = []

    def fisher(clip, index, weights, workers):
        state = {name: value.clone() for name, value in clip.model.state_dict().items()}
        seen.append((state, len(index)))
        return {"visual.proj": torch.full_like(state["visual.proj"], float(len(seen)))}

    monkeypatch.setattr(command, "fisher_information", fisher)
    got = load_file(soup(config_of(files, drawings, tmp_path, "fisher")))
    models = [load_file(file) for file in files]
    assert [n for _, n in seen] == [16] * 3
    for (state, _), model in zip(seen, models, strict=True):
        assert all(torch.equal(state[name], value) for name, value in model.items())
    shape = models[0]["visual.proj"].shape
    weights = fisher_weighted(models, [{"visual.proj": torch.full(shape, float(n))} for n in (1, 2, 3)])
    assert all(torch.equal(got[name], value) for name, value in weights.items())


def other_width(folder: Path, tiny_config: Path) -> Path:
    config = json.loads(tiny_config.read_text())
    config["vision_cfg"]["layers"] += 1
    (folder / "other.json").write_text(json.dumps(config))
    clip = load_clip(str(folder / "other.json"), None)
    save_weights(clip.model.state_dict(), folder / "other.safetensors", clip.architecture.metadata())
    return folder / "other.safetensors"


def other_form(folder: Path, tiny_config: Path) -> Path:
    clip = load_clip(str(tiny_config), None)
    metadata = clip.architecture.metadata() | {"contrast": "sigmoid", "logit_bias": "-10.0"}
    save_weights(clip.model.state_dict(), folder / "other.safetensors", metadata)
    return folder / "other.safetensors"


def nameless(folder: Path, tiny_config: Path) -> Path:
    save_weights(load_clip(str(tiny_config), None).model.state_dict(), folder / "other.safetensors")
    return folder / "other.safetensors"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            other_width,
            r"a soup mixes weights of one architecture: vision_cfg.layers is 2 in '.*other.* and 1 in",
        ),
        (other_form, r"with the sigmoid with a bias of -10: their average would be neither"),
        (nameless, "does not say its model: give runs, or files of weights that tracer wrote"),
        (lambda folder, _: folder / "nowhere", "nowhere' does not exist"),
    ],
)
def test_what_cannot_be_mixed_is_one_line_before_weights_are_read(
    files, drawings, tiny_config, tmp_path, monkeypatch, make, says
):
    other = make(tmp_path, tiny_config)
    monkeypatch.setattr(command, "load_file", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=says):
        soup(config_of([files[0], other], drawings, tmp_path))


def test_runs_of_two_starts_are_refused_before_weights_are_read(files, drawings, tmp_path, monkeypatch):
    """Regression: they were mixed without a word, though the page said that they are not."""
    runs = []
    for n, start in enumerate("aab"):
        runs.append(tmp_path / f"run-{n}")
        runs[-1].mkdir()
        shutil.copy(files[n], runs[-1] / "student.safetensors")
        (runs[-1] / "run.json").write_text(json.dumps({"weights": {"zero-shot": start}}))
    soup(config_of(runs[:2], drawings, tmp_path, output=tmp_path / "one-start.safetensors"))
    monkeypatch.setattr(command, "load_file", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(
        UserError, match=r"run-0' and '.*run-2' began at different weights, so that their mean"
    ):
        soup(config_of(runs, drawings, tmp_path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"validation": Path("v.csv")}, "--validation has no effect with --kind uniform: leave it out"),
        ({"runs": [Path("a"), Path("b"), Path("a")]}, "'a' is named twice: a soup takes each once"),
    ],
)
def test_what_would_be_ignored_is_refused(changes, says):
    """Regression: the mean without --kind, and a run that counted twice, came without a word."""
    with pytest.raises(UserError, match=says):
        SoupConfig(**{"runs": [Path("a"), Path("b")]} | changes).validate()


def test_the_command(files, drawings, tmp_path, capsys):
    words = [str(word) for word in (*files[:2], "--output", tmp_path / "out.safetensors")]
    assert main(["soup", *words]) == 0
    assert f"weights: {tmp_path / 'out.safetensors'}" in capsys.readouterr().out
    assert main(["soup", *words]) == 2
    assert "exists: choose another --output" in capsys.readouterr().err
    assert main(["soup", str(files[0])]) == 2
    assert "give at least two" in capsys.readouterr().err
    assert main(["soup", *map(str, files), "--kind", "greedy"]) == 2
    assert "--kind greedy needs labelled pictures: give --validation PATH" in capsys.readouterr().err
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    assert main(["soup", *map(str, files), "--kind", "greedy", "--validation", str(nothing)]) == 2
    assert "holds no pictures" in capsys.readouterr().err
    assert Form() == load_clip("auto", str(tmp_path / "out.safetensors")).form
