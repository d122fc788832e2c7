"""Time and memory of the loss, forward and backward: TRACER, the published formulation, and other packages.

    python -m benchmarks.losses                     tables
    python -m benchmarks.losses --json              the same results as JSON
    python -m benchmarks.losses --quick             the sizes of the main tables alone
    python -m benchmarks.losses --cases "[full, clip]" --precisions "[bf16]" --pairs 8192

Competitors take turns in one process. Times are medians with the 20th and 80th percentile, separately for
forward (with what backward needs) and backward. A competitor is timed only after the check of its loss and all
gradients. Memory is the peak beyond the inputs, each in a fresh process. The tables name what does not fit into
memory or into the time budget, and say why. On a GPU times are the device's, from cold caches; small batches
are timed a second time as replayed graphs; ``nsys profile python -m benchmarks.losses`` shows each call by
name.

The implementations and the check are in ``competitors.py``, the tables and pictures in ``losses_page.py``.
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

from benchmarks import competitors, gpu
from benchmarks.competitors import (
    CASES,
    COMPILED,
    DEVICE,
    DISTINCT,
    HALF,
    OURS,
    PACKAGES,
    SIGLIP_KERNEL,
    TOLERANCE,
    Problem,
    Size,
    Step,
    baseline,
    check,
    competitors_of,
    float32_products,
    lacks_memory,
    lacks_package,
    precisions_here,
    size_of,
    synchronize,
)  # fmt: skip
from benchmarks.harness import command_line, progress
from benchmarks.losses_page import PICTURES, figures, highlights, ratios, report
from benchmarks.measure import (
    TOTAL,
    WrongResult,
    available_memory,
    interleaved,
    interleaved_phases,
    peak_memory,
)
from tracer.kernels._blocked_tile import product

__all__ = ["PICTURES", "figures", "highlights", "measure", "ratios", "report"]

SWEEP = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
WIDTHS = (512, 768, 1280)
COPY_BYTES, MATRIX_SIDE = 1 << 30, 2048  # sizes with which rates are measured; for a GPU see gpu.matrix_side
SMALL = 5e-3  # seconds; faster steps are also timed as replayed graphs on a GPU


class Bench:
    """Measures rows one after the other until a deadline, predicting the time of each from the rows before it."""

    def __init__(self, budget: float, repeats: int, patience: float) -> None:
        self.deadline = time.monotonic() + budget
        self.repeats, self.patience = repeats, patience
        self.pace: dict[tuple[str, str, str], float] = {}  # seconds per unit of work of the last row

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def predicted(self, size: Size, competitor: str) -> float:
        """Return the predicted seconds of one step; 0 before the first row of its kind."""
        return self.pace.get((size.case, size.precision, competitor), 0.0) * size.work

    def needed(self, size: Size, competitor: str) -> float:
        """Return the predicted seconds that a row takes at the least: a check and three turns."""
        return 4 * self.predicted(size, competitor)

    def row(self, size: Size, names: Sequence[str], seconds: float, main: bool = False) -> dict[str, Any]:
        """Check and time competitors; those that can't take part get a note that says why."""
        entries: dict[str, dict[str, Any]] = {name: {} for name in names}
        steps, first_call = self._check_all(size, entries)
        times = interleaved_phases(
            {name: step.phases for name, step in steps.items()},
            repeats=self.repeats,
            warmup=1 if DEVICE == "cuda" else 0,  # the check has been a first call
            budget=min(seconds, max(0.0, self.left())),
            label=f"{size}: ",
        )
        for name in steps:
            entries[name]["time"] = times[name]
            typical = times[name][TOTAL].median
            self.pace[size.case, size.precision, name] = typical / size.work
            if name.endswith(COMPILED):
                entries[name]["compile"] = max(0.0, first_call[name] - typical)
        if DEVICE == "cuda":
            self.replay(size, {n: s for n, s in steps.items() if times[n][TOTAL].median < SMALL}, entries)
        return {**size._asdict(), "main": main, "competitors": entries}

    def _check_all(
        self, size: Size, entries: dict[str, dict[str, Any]]
    ) -> tuple[dict[str, Step], dict[str, float]]:
        """Return the checked steps and the seconds of their first calls; write a note for everyone else."""
        problem = Problem(size.pairs, size.width)
        steps: dict[str, Step] = {}
        first_call: dict[str, float] = {}
        spare = self.left() - self.needed(size, OURS)
        for name, entry in entries.items():
            if name != OURS:
                spare -= self.needed(size, name)
            if why := self.why_not(size, name, spare):
                entry["note"] = why
                spare += self.needed(size, name)
                continue
            try:
                steps[name], first_call[name] = self.begin(size, name, problem)
            except torch.OutOfMemoryError:
                entry["note"] = "does not fit into the GPU's memory"
            except WrongResult as error:
                if name not in PACKAGES:
                    raise
                entry["note"] = str(error)  # a mistake of another package ends its part alone
            except Exception as error:
                if not name.endswith(COMPILED) and name not in PACKAGES:
                    raise
                entry["note"] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return steps, first_call

    def replay(self, size: Size, steps: Mapping[str, Step], entries: dict[str, dict[str, Any]]) -> None:
        """Time small steps once more as replayed graphs, in turns, and check what the graphs compute."""
        captured = {name: gpu.captured(step.phases) for name, step in steps.items()}
        graphs = {name: phases for name, phases in captured.items() if phases is not None}
        times = interleaved_phases(graphs, repeats=4 * self.repeats, budget=5.0, label=f"{size}, replayed: ")
        for name, taken in times.items():
            check(size.case, name, size.precision, steps[name].result(), size.pairs, size.width)
            entries[name]["replay"] = taken

    def why_not(self, size: Size, name: str, spare: float) -> str | None:
        """Say why a competitor is left out of a row; ``spare`` is the time that remains after it, in seconds."""
        step = self.predicted(size, name)
        if name != OURS and step and (step > self.patience or spare < 0):
            return f"left out: {step:.1f} s a step by its pace so far"
        return lacks_package(name) or lacks_memory(size.case, name, *size[1:])

    def begin(self, size: Size, name: str, problem: Problem) -> tuple[Step, float]:
        """Check a competitor's first call; return its step and the seconds that this call took."""
        step = problem.step(size.case, name, size.precision)
        started = time.perf_counter()
        step()
        synchronize()
        taken = time.perf_counter() - started
        check(size.case, name, size.precision, step.result(), size.pairs, size.width)
        return step, taken


def memory_call(case: str, competitor: str, precision: str, pairs: int, width: int) -> Callable[[], Any]:
    """Return one step for :func:`benchmarks.measure.peak_memory`, after a small step has loaded the libraries.

    A compiled competitor runs the whole step beforehand, since the compiler's own memory is not the loss's.
    """
    step = Problem(pairs, width).step(case, competitor, precision)
    warm_up = step if competitor.endswith(COMPILED) else Problem(64, width).step(case, competitor, precision)
    warm_up()
    return step


def peak(size: Size, competitor: str) -> int:
    """Return the extra bytes of a step at its peak, measured in a fresh process."""
    arguments = (size.case, competitor, size.precision, size.pairs, size.width)
    return peak_memory("benchmarks.losses", "memory_call", *arguments)


def add_peaks(row: dict[str, Any]) -> None:
    """Measure the memory of every competitor of a row that was timed."""
    for name, entry in row["competitors"].items():
        if "time" in entry:
            entry["memory"] = peak(size_of(row), name)


def rates(precisions: Sequence[str]) -> dict[str, Any]:
    """Measure how fast this machine copies (bytes/s, read and written) and multiplies matrices (operations/s)."""
    size = min(COPY_BYTES, available_memory() // 16)
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    copied = torch.empty_like(source)
    copy = interleaved({"copy": lambda: copied.copy_(source)}, repeats=9)["copy"].median
    side = gpu.matrix_side() if DEVICE == "cuda" else MATRIX_SIDE
    products = {}
    for precision in precisions:
        a, b = torch.randn(2, side, side, device=DEVICE).to(HALF.get(precision, torch.float32)).unbind()
        with float32_products(precision):
            times = interleaved({"matrix product": _matrix_product(a, b)}, repeats=9)
            products[precision] = 2 * side**3 / times["matrix product"].median
    return {"copy": 2 * size / copy, "matrix": products}


def _matrix_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """Return a call of a @ b.T into the same memory, on a CPU by the library that the loss uses there."""
    out = a.new_empty(len(a), len(b))
    if DEVICE == "cuda":
        return partial(torch.mm, a, b.T, out=out)
    return lambda: product(a, b, lambda: out)


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
    """Measure time and memory of the loss.

    Args: quick: only the main tables, of TRACER and its baseline, and the memory of one row. cases: any of
    full, mpm-nce, mpm-nce-2, clip, siglip and lit; all by default. precisions: any of fp32, tf32, bf16 and fp16;
    by default all that this machine multiplies in. pairs: N of the main tables. width: D of the main tables.
    sweep: every N of the second table; 512 to 65536 by default. widths: every D of the second table; 512, 768
    and 1280 by default. repeats: the most turns of a row; it always gets at least three. seconds: time for
    the turns of a row of the main tables; other rows get half of it. patience: seconds that a competitor's
    step may take before it is left out of larger sizes. budget: seconds for the main tables; competitors that
    would take longer are left out. sweep_budget: seconds for the second table; sizes that would take longer
    are left out, the largest first.
    """
    cases, precisions = list(cases or CASES), list(precisions or precisions_here())
    _require_known(cases, precisions)
    bench = Bench(budget, repeats, patience)
    mains = _main_sizes(cases, precisions, pairs, width)
    growth: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    with fresh_compiler_cache():
        if not quick:
            start_compiler()
        rows = []
        for size in mains:
            progress(f"losses: {size}")
            entrants = [OURS, baseline(size.case)] if quick else competitors_of(size.case)
            rows.append(bench.row(size, entrants, seconds / 2 if quick else seconds, main=True))
        for row in rows[:1] if quick else rows:
            progress(f"losses: memory of {row['case']}, {row['precision']}")
            add_peaks(row)
        if not quick:
            growth = _growth([c for c in ("full", "clip") if c in cases], precisions[0], pairs, width)
            others = _other_sizes(cases, precisions, sweep or SWEEP, widths or WIDTHS, mains)
            bench.deadline = time.monotonic() + sweep_budget
            more, left_out = _sweep(bench, others, width, seconds / 2)
            rows += more
    return {
        "device": DEVICE,
        "main": {"pairs": pairs, "width": width},
        "rows": rows,
        "growth": growth,
        "left_out": left_out,
        "rates": rates(precisions),
    }


def _require_known(cases: Sequence[str], precisions: Sequence[str]) -> None:
    if unknown := [*({*cases} - CASES.keys()), *({*precisions} - TOLERANCE.keys())]:
        raise SystemExit(
            f"unknown {', '.join(unknown)}: cases are {', '.join(CASES)}; precisions {', '.join(TOLERANCE)}"
        )


def _main_sizes(cases: Sequence[str], precisions: Sequence[str], pairs: int, width: int) -> list[Size]:
    """Return the sizes of the main tables; some cases can be checked up to ``DISTINCT`` pairs only."""
    most = {case: pairs if competitors.repeats(case) else competitors.DISTINCT for case in cases}
    return [
        Size(case, precision, min(pairs, most[case]), width) for case in cases for precision in precisions
    ]


def _other_sizes(
    cases: Sequence[str],
    precisions: Sequence[str],
    sweep: Sequence[int],
    widths: Sequence[int],
    mains: Sequence[Size],
) -> list[Size]:
    """Return the sizes of the second table: the whole objective and the CLIP loss at every N and D of it."""
    swept = [case for case in cases if case in ("full", "clip")]
    sizes = [
        Size(case, precision, n, d)
        for case in swept
        for precision in precisions
        for n in sweep
        for d in widths
    ]
    return [size for size in sizes if size not in mains]


def _growth(cases: Sequence[str], precision: str, pairs: int, width: int) -> list[dict[str, Any]]:
    """Measure memory as the batch doubles, in fresh processes."""
    points = []
    for case in cases:
        for n in (pairs // 4, pairs // 2, pairs, 2 * pairs):
            size = Size(case, precision, n, width)
            progress(f"losses: memory of {size}")
            peaks = {
                name: peak(size, name)
                for name in (OURS, baseline(case))
                if not lacks_memory(case, name, precision, n, width)
            }
            points.append({"case": case, "precision": precision, "pairs": n, "memory": peaks})
    return points


def _sweep(
    bench: Bench, sizes: Sequence[Size], main_width: int, seconds: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure sizes in the order of their work; return the rows, and the sizes that the budget did not allow.

    Sizes of the main tables' width come earlier, so that its curve becomes long.
    """
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for size in sorted(sizes, key=lambda s: s.work * (1 if s.width == main_width else 8)):
        entrants = [OURS, baseline(size.case)]
        if size.width == main_width and size.precision == "fp32":
            entrants.append(baseline(size.case) + COMPILED)
        if size.case == "clip" and DEVICE == "cuda":
            # The definition that siglip-kernel is checked by stores the whole matrix.
            entrants += [name for name in PACKAGES if name != SIGLIP_KERNEL or size.pairs <= DISTINCT]
        need = bench.needed(size, OURS)
        if need > bench.left():
            left_out.append({**size._asdict(), "seconds": need})
            continue
        progress(f"losses: {size}, {bench.left():.0f} s left")
        rows.append(bench.row(size, entrants, seconds))
    return rows, left_out


@contextmanager
def fresh_compiler_cache() -> Iterator[None]:
    """Give torch.compile an empty cache within the block, so that it takes as long as on first use."""
    with (
        tempfile.TemporaryDirectory(prefix="losses-compiled-") as folder,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        yield


def start_compiler() -> None:
    """Compile something small: only the first compilation of a process pays for this, and no competitor should."""
    try:
        torch.compile(lambda x: (x.softmax(0) + 1).sum())(torch.ones(64, device=DEVICE))
    except Exception as error:
        progress(f"losses: torch.compile does not work here: {type(error).__name__}")


if __name__ == "__main__":
    command_line(measure, report)
