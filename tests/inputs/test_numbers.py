"""Numbers that are not finite: a run skips and counts the steps that give them, and scores nothing with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tracer.cli import main
from tracer.losses import TracerLoss
from tracer.train.log import read_log


def options(tiny_config, drawings, tmp_path, **changes) -> list[str]:
    """Return the options of a short run on the drawn pictures, from random weights."""
    settings = {
        "train_data": drawings / "train.csv", "eval_data.held_out": drawings / "test.csv", "model": tiny_config,
        "pretrained": "null", "output": tmp_path / "run", "cache": tmp_path / "cache", "steps": 6, "warmup": 0,
        "batch_size": 8, "precision": "fp32",
    } | changes  # fmt: skip
    return ["finetune", *(str(x) for name, value in settings.items() for x in (f"--{name}", value))]


def strict(path: Path) -> object:
    """Return the content of a JSON file, which may hold no NaN."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{path} holds {name}"))


def poison_loss(monkeypatch, calls: set[int], value: float = float("nan")) -> None:
    """Make the loss of these calls (0, 1, …) ``value``; an infinite one keeps its finite gradients."""
    forward, count = TracerLoss.forward, iter(range(10**6))

    def poisoned(*args, **kwargs):
        output = forward(*args, **kwargs)
        return output._replace(loss=output.loss + value) if next(count) in calls else output

    monkeypatch.setattr(TracerLoss, "forward", poisoned)


def test_in_fp16_a_large_loss_scale_is_not_a_loss_that_is_not_finite(
    tiny_config, drawings, tmp_path, monkeypatch
):
    """The steps that it skips do not end the run; those of a NaN do."""
    argv = options(tiny_config, drawings, tmp_path, precision="fp16", max_skipped=2, steps=14)
    assert main(argv) == 0
    rows = read_log(tmp_path / "run")
    overflow = [row["overflow"] for row in rows]
    assert sum(overflow) >= 3
    assert overflow == [row["skipped"] for row in rows]
    assert sum(overflow[:4]) >= 3  # more in a row than --max_skipped
    assert rows[-1]["loss_scale"] < rows[0]["loss_scale"]
    poison_loss(monkeypatch, {9, 10})
    argv[argv.index("--output") + 1] = str(tmp_path / "poisoned")
    assert main(argv) == 2


def test_in_fp16_a_gradient_that_is_never_finite_ends_the_run(
    tiny_config, drawings, tmp_path, monkeypatch, capsys
):
    (tmp_path / "deepspeed.json").write_text('{"fp16": {"initial_scale_power": 2, "hysteresis": 1}}')
    forward = TracerLoss.forward

    def endless(*args, **kwargs):
        output = forward(*args, **kwargs)
        return output._replace(loss=output.loss + (output.loss * 0 - 1).sqrt().nan_to_num())

    monkeypatch.setattr(TracerLoss, "forward", endless)
    changes = {"precision": "fp16", "max_skipped": 3, "steps": 30, "deepspeed": tmp_path / "deepspeed.json"}
    assert main(options(tiny_config, drawings, tmp_path, **changes)) == 2
    assert "was not finite in 3 steps in a row; the last is step 4" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("changes", [{"zero_stage": s, "projection_product": 0} for s in (0, 1, 2, 3)])
@pytest.mark.parametrize("clip_grad", [0, 1])
def test_a_step_without_a_finite_loss_is_skipped_and_counted(
    tiny_config, drawings, tmp_path, monkeypatch, changes, value, clip_grad
):
    poison_loss(monkeypatch, {2, 3}, value)
    argv = options(tiny_config, drawings, tmp_path, clip_grad=clip_grad, **changes)
    assert main(argv) == 0
    rows = read_log(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 0, 0]
    assert ["loss" in row for row in rows] == [True, True, False, False, True, True]
    assert len({row["lr"] for row in rows[2:5]}) == 1  # the schedule waits
    for weights in ("student", "teacher"):
        state = load_file(tmp_path / "run" / f"{weights}.safetensors")
        assert all(value.isfinite().all() for value in state.values())
    strict(tmp_path / "run" / "metrics.json")
    strict(tmp_path / "run" / "run.json")


def test_one_micro_batch_is_enough_to_skip_the_step(tiny_config, drawings, tmp_path, monkeypatch):
    poison_loss(monkeypatch, {2})
    assert main(options(tiny_config, drawings, tmp_path, accumulation=2)) == 0
    assert [row["skipped"] for row in read_log(tmp_path / "run")] == [0, 1, 0, 0, 0, 0]


def test_after_a_bound_the_run_stops_and_names_step_batch_and_files(
    capsys, tiny_config, drawings, tmp_path, monkeypatch
):
    poison_loss(monkeypatch, set(range(1, 99)))
    argv = options(tiny_config, drawings, tmp_path, steps=30, max_skipped=3, save_every=3)
    assert main(argv) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite in 3 steps in a row; the last is step 4, batch 4 with '" in line
    assert ".png' and 5 more: lower --lr" in line
    assert not (tmp_path / "run").exists()
    poison_loss(monkeypatch, set(range(99)))  # resumed after step 3, which was the second in a row
    assert main(argv) == 2
    assert "not finite in 3 steps in a row; the last is step 4" in capsys.readouterr().err


@pytest.mark.parametrize("clip_grad", [0, 1])
def test_weights_that_overflow_are_never_scored(capsys, tiny_config, drawings, tmp_path, clip_grad):
    """Regression: exit code 0 and "25.0 %", which is argmax of NaN."""
    for steps in (3, 40):
        argv = options(
            tiny_config, drawings, tmp_path, lr="1e30", clip_grad=clip_grad, steps=steps, method="flyp"
        )
        assert main([*argv, "--output", str(tmp_path / f"run-{steps}")]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "not finite" in line or "NaN or infinite" in line
        assert not (tmp_path / f"run-{steps}").exists()


def test_a_run_without_a_single_step_is_no_result(capsys, tiny_config, drawings, tmp_path, monkeypatch):
    poison_loss(monkeypatch, set(range(99)))
    assert main(options(tiny_config, drawings, tmp_path)) == 2
    assert "not finite in 6 steps in a row" in capsys.readouterr().err
