"""The loss, forward and backward: ours beside the published formulation, open_clip's and Inf-CL's.

    python -m benchmarks.losses                     tables for people
    python -m benchmarks.losses --json              the same for machines
    python -m benchmarks.losses --quick             the main table's sizes alone
    python -m benchmarks.losses --cases "[full, clip]" --precisions "[bf16]" --pairs 8192

Competitors take turns in one process: medians with the 20th and 80th percentile, forward (with what backward
needs) and backward apart. A competitor gets a time only after its loss and all gradients were found right.
Memory is the peak beyond the inputs, each in a fresh process. Whatever does not fit into memory or into the
budget of time is named, with the reason. On a GPU times are the device's, from cold caches; small batches are
timed a second time as replayed graphs; ``nsys profile python -m benchmarks.losses`` shows each call by name.

What is computed, by whom, and what is right: ``_competitors.py``. The tables and pictures: ``_losses_page.py``.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import _competitors, _gpu, _measure
from benchmarks._competitors import (
    CASES,
    COMPILED,
    DEVICE,
    HALF,
    INF_CL,
    OURS,
    TOLERANCE,
    Problem,
    Size,
    Step,
    check,
    everyone,
    float32_products,
    lacks_memory,
    lacks_package,
    precisions_here,
    size_of,
    synchronize,
    theirs,
)  # fmt: skip
from benchmarks._losses_page import figures, highlights, ratios, report
from benchmarks._measure import TOTAL
from benchmarks._part import command_line, progress
from tracer.kernels._blocked_tile import product

__all__ = ["exact", "figures", "highlights", "measure", "ratios", "report"]

SWEEP = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
WIDTHS = (512, 768, 1280)
COPY_BYTES, MATRIX_SIDE = 1 << 30, 2048  # of the measured rates; a GPU has a side of its own
SMALL = 5e-3  # seconds on a GPU below which a step is also timed as replayed graphs


class Bench:
    """Rows, taken one after the other until a deadline; what earlier ones took predicts what the next will."""

    def __init__(self, budget: float, repeats: int, patience: float) -> None:
        self.deadline = time.monotonic() + budget
        self.repeats, self.patience = repeats, patience
        self.pace: dict[tuple[str, str, str], float] = {}  # seconds per unit of work of the last row

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def predicted(self, size: Size, who: str) -> float:
        """Seconds of one step; 0 as long as nothing is known."""
        return self.pace.get((size.case, size.precision, who), 0.0) * size.work

    def needed(self, size: Size, who: str) -> float:
        """Seconds of a row: a check and three turns."""
        return 4 * self.predicted(size, who)

    def row(self, size: Size, who: Sequence[str], seconds: float, main: bool = False) -> dict[str, Any]:
        """Check and time competitors; those that can't take part get a note that says why."""
        problem = Problem(size.pairs, size.width)
        found: dict[str, dict[str, Any]] = {name: {} for name in who}
        steps: dict[str, Step] = {}
        spare = self.left() - self.needed(size, OURS)
        for name in who:
            if name != OURS:
                spare -= self.needed(size, name)
            if why := self.why_not(size, name, spare):
                found[name]["note"] = why
                spare += self.needed(size, name)
                continue
            try:
                steps[name], found[name]["first"] = self.begin(size, name, problem)
            except torch.OutOfMemoryError:
                found[name]["note"] = "does not fit into the GPU's memory"
            except _measure.WrongResult as error:
                if name != INF_CL:
                    raise
                found[name]["note"] = str(error)  # another package's mistake: no speed for it, ours goes on
            except Exception as error:
                if not name.endswith(COMPILED) and name != INF_CL:
                    raise
                found[name]["note"] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        times = _measure.interleaved_phases(
            {name: step.phases for name, step in steps.items()},
            repeats=self.repeats,
            warmup=1 if DEVICE == "cuda" else 0,  # the check was one
            budget=min(seconds, max(0.0, self.left())),
            label=f"{size}: ",
        )
        for name in steps:
            found[name]["time"] = times[name]
            typical = times[name][TOTAL].median
            self.pace[size.case, size.precision, name] = typical / size.work
            first = found[name].pop("first")
            if name.endswith(COMPILED):
                found[name]["compile"] = max(0.0, first - typical)
        if DEVICE == "cuda":
            self.replay(size, {n: s for n, s in steps.items() if times[n][TOTAL].median < SMALL}, found)
        return {**size._asdict(), "main": main, "competitors": found}

    def replay(self, size: Size, steps: Mapping[str, Step], found: dict[str, dict[str, Any]]) -> None:
        """Time small steps once more as replayed graphs, in turns, and check what the graphs compute."""
        captured = {name: _gpu.captured(step.phases) for name, step in steps.items()}
        graphs = {name: phases for name, phases in captured.items() if phases is not None}
        times = _measure.interleaved_phases(
            graphs, repeats=4 * self.repeats, budget=5.0, label=f"{size}, replayed: "
        )
        for name, taken in times.items():
            check(size.case, name, size.precision, steps[name].result(), size.pairs, size.width)
            found[name]["replay"] = taken

    def why_not(self, size: Size, name: str, spare: float) -> str | None:
        step = self.predicted(size, name)
        if name != OURS and step and (step > self.patience or spare < 0):
            return f"left out: {step:.1f} s a step by its pace so far"
        return lacks_package(name) or lacks_memory(size.case, name, *size[1:])

    def begin(self, size: Size, name: str, problem: Problem) -> tuple[Step, float]:
        """A competitor's step after its first, checked call, and how long that took."""
        step = problem.step(size.case, name, size.precision)
        started = time.perf_counter()
        step()
        synchronize()
        taken = time.perf_counter() - started
        check(size.case, name, size.precision, step.result(), size.pairs, size.width)
        return step, taken


def memory_call(case: str, who: str, precision: str, pairs: int, width: int) -> Callable[[], Any]:
    """For :func:`benchmarks._measure.peak_memory`: one step, after a small one has loaded the libraries.

    What is compiled does the step itself before: the compiler's own memory is not the loss's.
    """
    step = Problem(pairs, width).step(case, who, precision)
    warm_up = step if who.endswith(COMPILED) else Problem(64, width).step(case, who, precision)
    warm_up()
    return step


def peak(size: Size, who: str) -> int:
    """Extra bytes of a step at its peak, in a fresh process."""
    arguments = (size.case, who, size.precision, size.pairs, size.width)
    return _measure.peak_memory("benchmarks.losses", "memory_call", *arguments)


def add_peaks(row: dict[str, Any]) -> None:
    """Measure the memory of those of a row that were timed."""
    for name, entry in row["competitors"].items():
        if "time" in entry:
            entry["memory"] = peak(size_of(row), name)


def _matrix_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """a @ b.T again and again into the same memory; on a CPU by the library that our loss takes there."""
    out = a.new_empty(len(a), len(b))
    if DEVICE == "cuda":
        return partial(torch.mm, a, b.T, out=out)
    return lambda: product(a, b, lambda: out)


def rates(precisions: Sequence[str]) -> dict[str, Any]:
    """What this machine's copy and matrix product reach: bytes/s read and written, operations/s."""
    size = min(COPY_BYTES, _measure.available_memory() // 16)
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = _measure.interleaved({"copy": lambda: target.copy_(source)}, repeats=9)["copy"].median
    side = _gpu.square() if DEVICE == "cuda" else MATRIX_SIDE
    found = {}
    for precision in precisions:
        a, b = torch.randn(2, side, side, device=DEVICE).to(HALF.get(precision, torch.float32)).unbind()
        with float32_products(precision):
            product = _matrix_product(a, b)
            times = _measure.interleaved({"matrix product": product}, repeats=9)
            found[precision] = 2 * side**3 / times["matrix product"].median
    return {"copy": 2 * size / copy, "matrix": found}


def measure(
    *,
    quick: bool = False,
    cases: list[str] | None = None,
    precisions: list[str] | None = None,
    pairs: int = 4096,
    width: int = 512,
    sweep: list[int] | None = None,
    widths: list[int] | None = None,
    repeats: int = 7,
    seconds: float = 8.0,
    patience: float = 15.0,
    budget: float = 300.0,
    sweep_budget: float = 210.0,
) -> dict[str, Any]:
    """Time and memory of the loss.

    Args:
        quick: the main table of ours and what it is compared with alone, the memory of one row, no other sizes.
        cases: of full, mpm-nce, mpm-nce-2 and clip; all by default.
        precisions: of fp32, tf32, bf16 and fp16; by default all that this machine multiplies in.
        pairs: N of the main table.
        width: D of the main table.
        sweep: the N of the second table; 512 to 65536 by default.
        widths: the D of the second table; 512, 768 and 1280 by default.
        repeats: most turns of a row; three at least.
        seconds: for the turns of a row of the main table, half of it for others.
        patience: seconds a step may take before a competitor of ours is left out.
        budget: seconds for the main table; competitors that would take longer are left out.
        sweep_budget: seconds for the second table; sizes that would take longer are left out, the largest first.
    """
    cases, precisions = list(cases or CASES), list(precisions or precisions_here())
    if unknown := [*({*cases} - CASES.keys()), *({*precisions} - TOLERANCE.keys())]:
        raise SystemExit(
            f"{', '.join(unknown)}: cases are {', '.join(CASES)}; precisions {', '.join(TOLERANCE)}"
        )
    bench = Bench(budget, repeats, patience)
    mains = [  # MPM-NCE is checked up to so many pairs only
        Size(case, precision, min(pairs, _competitors.DISTINCT) if case.startswith("mpm") else pairs, width)
        for case in cases
        for precision in precisions
    ]
    growth: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    with fresh_compiler_cache():
        if not quick:
            start_compiler()
        rows = []
        for size in mains:
            progress(f"losses: {size}")
            who = [OURS, theirs(size.case)] if quick else everyone(size.case)
            rows.append(bench.row(size, who, seconds / 2 if quick else seconds, main=True))
        for row in rows[:1] if quick else rows:
            progress(f"losses: memory of {row['case']}, {row['precision']}")
            add_peaks(row)
        if not quick:
            growth = _growth([c for c in ("full", "clip") if c in cases], precisions[0], pairs, width)
            sizes = [
                Size(case, precision, n, d)
                for case in cases
                if case in ("full", "clip")
                for precision in precisions
                for n in sweep or SWEEP
                for d in widths or WIDTHS
            ]
            bench.deadline = time.monotonic() + sweep_budget
            more, left_out = _sweep(bench, [s for s in sizes if s not in mains], width, seconds / 2)
            rows += more
    return {
        "device": DEVICE,
        "main": {"pairs": pairs, "width": width},
        "rows": rows,
        "growth": growth,
        "left_out": left_out,
        "rates": rates(precisions),
    }


def _growth(cases: Sequence[str], precision: str, pairs: int, width: int) -> list[dict[str, Any]]:
    """Memory as the batch doubles, in fresh processes."""
    found = []
    for case in cases:
        for n in (pairs // 4, pairs // 2, pairs, 2 * pairs):
            size = Size(case, precision, n, width)
            progress(f"losses: memory of {size}")
            peaks = {
                who: peak(size, who)
                for who in (OURS, theirs(case))
                if not lacks_memory(case, who, precision, n, width)
            }
            found.append({"case": case, "precision": precision, "pairs": n, "memory": peaks})
    return found


def _sweep(
    bench: Bench, sizes: Sequence[Size], main_width: int, seconds: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows in the order of their work, as many as the budget allows, and the sizes of the others.

    The main table's width comes earlier, so that its curve gets long.
    """
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for size in sorted(sizes, key=lambda s: s.work * (1 if s.width == main_width else 8)):
        who = [OURS, theirs(size.case)]
        if size.width == main_width and size.precision == "fp32":
            who.append(theirs(size.case) + COMPILED)
        if size.case == "clip" and DEVICE == "cuda":
            who.append(INF_CL)
        need = bench.needed(size, OURS)
        if need > bench.left():
            left_out.append({**size._asdict(), "seconds": need})
            continue
        progress(f"losses: {size}, {bench.left():.0f} s left")
        rows.append(bench.row(size, who, seconds))
    return rows, left_out


@contextmanager
def fresh_compiler_cache() -> Iterator[None]:
    """torch.compile begins with nothing on disk, so that its time is that of a first use."""
    with (
        tempfile.TemporaryDirectory(prefix="losses-compiled-") as folder,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        yield


def start_compiler() -> None:
    """What only the first compilation of a process pays, so that no competitor does."""
    try:
        torch.compile(lambda x: (x.softmax(0) + 1).sum())(torch.ones(64, device=DEVICE))
    except Exception as error:
        progress(f"losses: torch.compile does not work here: {type(error).__name__}")


def exact(results: dict[str, Any]) -> dict[str, float]:
    """None: memory as counted is a part of its own."""
    return {}


if __name__ == "__main__":
    command_line(measure, report)
