"""Commands on finished runs: other scales of adapters, averages of weights, and what is no run."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tracer.adapters import fold, read_adapters
from tracer.errors import UserError
from tracer.models.clip import load_clip
from tracer.train.finished import FoldConfig, ShowConfig, WiseConfig, average, fold_again, show
from tracer.train.run import finetune


@pytest.fixture
def run(config) -> Path:
    return finetune(
        dataclasses.replace(config, method="r-adapter", steps=2, warmup=0, eval_data={}, adapter_momentum=0.5)
    )


def test_adapters_are_folded_with_another_scale(config, run):
    start = load_file(config.pretrained)
    for last, name in ((False, "adapters"), (True, "adapters_last")):
        path = fold_again(FoldConfig(run, 0.3, last, run / f"{name}-again.safetensors"))
        want = fold(start | read_adapters(run / f"{name}.safetensors", "tiny-clip"), 0.3)
        assert all(torch.equal(value, want[key]) for key, value in load_file(path).items())
    assert load_clip("auto", str(path)).name == "tiny-clip"  # it says what it is
    with pytest.raises(UserError, match="exists: choose another --output"):
        fold_again(FoldConfig(run, 0.3, output=path))
    with pytest.raises(UserError, match=r"adapters alone: fold them first with 'tracer fold .* --alpha 0.5'"):
        load_clip(config.model, str(run / "adapters.safetensors"))
    with open(config.pretrained, "r+b") as start_file:
        start_file.seek(-4, 2)
        start_file.write(b"\0\0\0\1")
    with pytest.raises(UserError, match="has changed since"):
        fold_again(FoldConfig(run, 0.4))


def test_weights_are_averaged(config, run, tmp_path):
    start, student = load_file(config.pretrained), load_file(run / "student.safetensors")
    for n, a in enumerate(("start", config.pretrained)):
        path = average(WiseConfig(Path(a), run, 0.25, tmp_path / f"wise-{n}.safetensors"))
        for key, value in load_file(path).items():
            torch.testing.assert_close(
                value, torch.lerp(start[key], student[key], 0.25), rtol=1e-6, atol=1e-7
            )
    finetune(
        dataclasses.replace(config, method="flyp", steps=1, warmup=0, eval_data={}, output=tmp_path / "flyp")
    )
    with pytest.raises(UserError, match=r"trained no adapters \('adapters.safetensors' is missing\)"):
        fold_again(FoldConfig(tmp_path / "flyp"))


def test_the_command_that_repeats_a_run_is_found_by_the_shell(config, monkeypatch):
    """Regression: it was 'tracer', which a shell outside the virtual environment does not know."""
    folder = finetune(dataclasses.replace(config, method="flyp", steps=1, warmup=0, eval_data={}))
    monkeypatch.setattr(sys, "argv", [".venv/bin/tracer", "show", str(folder)])
    monkeypatch.setattr("shutil.which", lambda _name: None)
    (line,) = (line for line in show(ShowConfig(folder))[0] if line.startswith("repeat it: "))
    assert line.startswith("repeat it: .venv/bin/tracer finetune --config ")
    monkeypatch.setattr("shutil.which", lambda _name: "/usr/bin/tracer")
    (line,) = (line for line in show(ShowConfig(folder))[0] if line.startswith("repeat it: "))
    assert line.startswith("repeat it: tracer finetune --config ")


def test_what_is_not_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"is not the folder of a finished run \(it holds no run.json\)"):
        show(ShowConfig(tmp_path))
    for name, content in (("run.json", "{}"), ("metrics.json", "{}"), ("config.yaml", "")):
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="was written by another version of tracer"):
        show(ShowConfig(tmp_path))
