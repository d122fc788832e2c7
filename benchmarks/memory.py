"""Memory of the loss, counted: bytes that torch hands out at the peak of forward and backward, beyond the inputs.

    python -m benchmarks.memory

The numbers come from the allocator's record of a step on the CPU with one thread, so they are the same at every
run and on every machine: products of bfloat16, and of float32 in oneDNN, are assumed, whatever this processor is
fastest with (with MKL's, on Intel's, a peak is lower by up to a tile). Gradients that are returned are part of
them; scratch that a matrix product's library takes and gives back is not. Of the GPU kernels the launchers run
without their kernels, in float32, with the tiles and the 132 multiprocessors of an H100: what they allocate does
not depend on what is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.competitors import CASES, EAGER, Problem, Step, baseline, check
from benchmarks.harness import command_line, progress, table
from benchmarks.measure import allocated
from tracer.kernels import _blocked_tile

BLOCKED, TRITON = "ours (blocked)", "ours (triton)"
SIZES = (512, 1024, 2048, 4096)
PRECISIONS = ("fp32", "bf16")


def measure(*, quick: bool = False, width: int = 512) -> dict[str, Any]:
    """Count allocated bytes as the batch doubles.

    Args:
        quick: ours up to N 2048 instead of 4096, what stores N×N matrices at N 512 only.
        width: D.
    """
    rows = []
    with one_thread(), any_processor():
        for case in CASES:
            for precision in PRECISIONS:
                progress(f"memory: {case}, {precision}")
                for who, most in ((BLOCKED, 4096), (EAGER, 1024), (baseline(case), 4096)):
                    most = min(most, (2048 if who == BLOCKED else 512) if quick else most)
                    sizes = [n for n in SIZES if n <= most]
                    rows.append(_row(case, precision, who, _count(case, precision, who, sizes, width)))
            with launches_left_out():
                counts = {
                    n: allocated(_step(case, "fp32", TRITON, n, width)) for n in SIZES[: 3 if quick else 4]
                }
            rows.append(_row(case, "fp32", TRITON, counts))
    return {"width": width, "rows": rows}


def _row(case: str, precision: str, who: str, counts: dict[int, int]) -> dict[str, Any]:
    return {"case": case, "precision": precision, "who": who, "bytes": {str(n): b for n, b in counts.items()}}


def _step(case: str, precision: str, who: str, pairs: int, width: int) -> Step:
    return Problem(pairs, width, device="cpu").step(case, who, precision)


def _count(case: str, precision: str, who: str, sizes: Sequence[int], width: int) -> dict[int, int]:
    """Return bytes by N, once the result of a small step has been checked."""
    small = _step(case, precision, who, 512, width)
    small()
    check(case, who, precision, small.result(), 512, width)
    return {n: allocated(_step(case, precision, who, n, width)) for n in sizes}


@contextmanager
def one_thread() -> Iterator[None]:
    """Take sums on one thread, because each thread holds a partial result of its own."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(kept)


@contextmanager
def any_processor() -> Iterator[None]:
    """Make the CPU implementation take the same products whatever the processor."""
    with (
        patch.object(_blocked_tile, "bfloat16_unit", lambda: "AMX"),
        patch.object(_blocked_tile, "mkl_knows_this_processor", lambda: False),
    ):
        yield


@contextmanager
def launches_left_out() -> Iterator[None]:
    """Run the GPU implementation on CPU tensors, with the tiles of an H100, up to the launch of its kernels."""
    from tracer.kernels._triton import planning_for, recording

    with planning_for("sm_90", 132), recording(execute=False):
        yield


def report(results: dict[str, Any]) -> str:
    """Return the table: MiB by batch size, and the growth at the last doubling of N."""
    rows = results["rows"]
    sizes = sorted({int(n) for row in rows for n in row["bytes"]})
    lines = []
    for row in rows:
        counts = row["bytes"]
        cells = [f"{counts[str(n)] / 2**20:.1f}" if str(n) in counts else "" for n in sizes]
        *before, last = counts.values()
        grown = f"×{last / before[-1]:.2f}" if before else ""
        lines.append([CASES[row["case"]], row["precision"], row["who"], *cells, grown])
    header = ["", "", "", *(f"N {n}" for n in sizes), "last doubling"]
    return f"MiB at the peak, D {results['width']}\n\n{table(header, lines)}"


def exact(results: dict[str, Any]) -> dict[str, float]:
    """Return the bytes of every row and size."""
    return {
        f"{row['case']} {row['precision']} N {n} D {results['width']}: {row['who']}, bytes": count
        for row in results["rows"]
        for n, count in row["bytes"].items()
    }


if __name__ == "__main__":
    command_line(measure, report)
