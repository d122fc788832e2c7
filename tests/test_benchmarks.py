"""The instruments of the benchmarks, and the memory of the loss as they measure it."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import _measure, losses
from tracer.kernels import contrastive

MIB = 2**20


def allocate(mebibytes):
    """For ``peak_memory``: a call that holds, for a moment, so many MiB."""
    return lambda: torch.ones(mebibytes * MIB, dtype=torch.uint8, device=losses.DEVICE)[0].item()


def test_peak_memory_sees_what_is_freed_again():
    assert _measure.peak_memory("tests.test_benchmarks", "allocate", 200) == pytest.approx(200 * MIB, rel=0.1)


def test_memory_of_the_loss_is_linear():
    """Less than one of the N×N matrices at N 4096 (64 MiB), and no quadratic growth up to there.

    On a GPU the backward pass may also hold one strip of gradient tiles, of a fixed size.
    """
    fixed = contrastive.STRIP_BYTES if losses.DEVICE == "cuda" else 0
    small, large = (
        _measure.peak_memory("benchmarks.losses", "memory_call", "full", "ours", "fp32", pairs, 64)
        for pairs in (2048, 4096)
    )
    assert large < 64 * MIB + fixed
    assert large < 2.5 * small + fixed


def test_turns_are_taken():
    order = []
    times = _measure.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 4
    assert times["a"].repeats == 3
    assert times["a"].low <= times["a"].median <= times["a"].high


def test_no_speed_without_a_right_result():
    _measure.require_close("sum", torch.ones(3), torch.ones(3), 1e-6)
    for wrong in (torch.full((3,), 1.1), torch.full((3,), float("nan"))):
        with pytest.raises(SystemExit, match="no speed without a right result: sum is off"):
            _measure.require_close("sum", wrong, torch.ones(3), 1e-6)


@pytest.mark.parametrize("case", losses.CASES)
def test_every_gradient_is_taken_and_checked(case, monkeypatch):
    """That of the scale too: a competitor that left it out would be spared work."""
    problem = losses.Problem(32, 16)
    checked = []
    monkeypatch.setattr(_measure, "require_close", lambda what, *_: checked.append(what.split(": ")[1]))
    losses.check(problem, case, "fp32")
    assert [what.split(" of ")[0] for what in checked] == [
        "loss", "image gradient", "text gradient", "scale gradient"
    ]  # fmt: skip


def test_losses_benchmark_in_miniature(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_measure, "peak_memory", lambda *args: 1)  # measured above; a process each is slow
    losses.main(["--pairs", "32", "--width", "16", "--repeats", "2", "--json", str(tmp_path / "out.json")])
    document = json.loads((tmp_path / "out.json").read_text())
    assert {(r["case"], r["precision"]) for r in document["results"]} == {
        (case, precision) for case in losses.CASES for precision in losses.PRECISIONS
    }
    assert all(r["speedup"] > 0 for r in document["results"])
    assert document["environment"]["torch"] == torch.__version__
    assert "whole objective" in capsys.readouterr().out
