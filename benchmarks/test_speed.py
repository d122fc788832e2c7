"""The loss through pytest-benchmark, for its comparisons between runs: ``pytest benchmarks --benchmark-only``.

Forward and backward at N 1024, D 512; as everywhere, nothing is timed before it was found right.
"""

from __future__ import annotations

import pytest

from benchmarks import losses

PAIRS, WIDTH = 1024, 512


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("case", "who"), [(case, who) for case in losses.CASES for who in (losses.OURS, losses.theirs(case))]
)
def test_forward_and_backward(benchmark, case, who, precision):
    step = losses.Problem(PAIRS, WIDTH).step(case, who, precision)
    step()
    losses.check(case, who, precision, step.result(), PAIRS, WIDTH)
    benchmark.group = f"{losses.CASES[case]}, {precision}"

    def finished() -> None:
        step()
        losses.synchronize()

    benchmark(finished)
