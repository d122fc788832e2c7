"""Time the losses and the teacher and run the counting parts with ``pytest benchmarks --benchmark-only``.

pytest-benchmark compares them between runs; the step and the loader have files of their own. As everywhere, a
result is checked before it is timed.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import competitors, teacher
from benchmarks.harness import Part, run_part

PAIRS, WIDTH = 1024, 512


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in competitors.CASES for name in (competitors.OURS, competitors.baseline(case))],
)
def test_loss(benchmark, case, name, precision):
    """Time a forward and backward pass at N 1024, D 512."""
    step = competitors.Problem(PAIRS, WIDTH).step(case, name, precision)
    step()
    competitors.check(case, name, precision, step.result(), PAIRS, WIDTH)
    benchmark.group = f"{competitors.CASES[case]}, {precision}"

    def finished() -> None:
        step()
        competitors.synchronize()

    benchmark(finished)


@pytest.mark.parametrize(
    ("mode", "update"),
    [("fp32", teacher.PUBLISHED), *((m, u) for m in teacher.MODES for u in (teacher.OURS, teacher.LOOP))],
)
def test_teacher(benchmark, mode, update):
    """Time one update of ViT-B/32's averages."""
    dtype = torch.bfloat16 if mode.startswith("bf16") else torch.float32
    model = teacher.build("ViT-B-32", competitors.DEVICE, dtype)
    call, _ = teacher.competitors(model, low=mode != "fp32")[update]
    benchmark.group = f"teacher, {mode}"
    call()  # builds the tables that later calls reuse
    with teacher.counting() as counter:
        call()

    def finished() -> None:
        call()
        competitors.synchronize()

    benchmark.pedantic(finished, rounds=5, warmup_rounds=1)
    benchmark.extra_info |= {"launches": counter.launches, "bytes": counter.bytes}


@pytest.mark.parametrize("part", ["memory", "work", "machine_code"])
def test_counting(benchmark, part):
    """Run a counting part in a process of its own, and record what it counted."""
    results = benchmark.pedantic(lambda: run_part(part, quick=True)["results"], rounds=1)
    benchmark.extra_info |= Part(part).exact(results)
