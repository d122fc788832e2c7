"""``pytest benchmarks --benchmark-only``: parts through pytest-benchmark, for its comparisons between runs.

The step and the loader have files of their own. As everywhere, nothing is timed before it was found right.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import _competitors, _page, teacher
from benchmarks._part import run_part

PAIRS, WIDTH = 1024, 512


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("case", "who"),
    [(case, who) for case in _competitors.CASES for who in (_competitors.OURS, _competitors.theirs(case))],
)
def test_loss(benchmark, case, who, precision):
    """Forward and backward at N 1024, D 512."""
    step = _competitors.Problem(PAIRS, WIDTH).step(case, who, precision)
    step()
    _competitors.check(case, who, precision, step.result(), PAIRS, WIDTH)
    benchmark.group = f"{_competitors.CASES[case]}, {precision}"

    def finished() -> None:
        step()
        _competitors.synchronize()

    benchmark(finished)


@pytest.mark.parametrize(
    ("mode", "update"),
    [("fp32", teacher.PUBLISHED), *((m, u) for m in teacher.MODES for u in (teacher.OURS, teacher.LOOP))],
)
def test_teacher(benchmark, mode, update):
    """One update of ViT-B/32's averages."""
    dtype = torch.bfloat16 if mode.startswith("bf16") else torch.float32
    model = teacher.build("ViT-B-32", _competitors.DEVICE, dtype)
    call, _ = teacher.competitors(model, low=mode != "fp32")[update]
    benchmark.group = f"teacher, {mode}"
    call()  # builds what later calls keep
    with teacher.counting() as counter:
        call()

    def finished() -> None:
        call()
        _competitors.synchronize()

    benchmark.pedantic(finished, rounds=5, warmup_rounds=1)
    benchmark.extra_info |= {"launches": counter.launches, "bytes": counter.bytes}


@pytest.mark.parametrize("part", ["memory", "work", "machine_code"])
def test_counting(benchmark, part):
    """What has no clock, in a process of its own that interprets or compiles; with what was counted."""
    results = benchmark.pedantic(lambda: run_part(part, quick=True)["results"], rounds=1)
    benchmark.extra_info |= _page.load(part).exact(results)
