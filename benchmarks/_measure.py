"""Measuring that can be trusted: interleaved medians, peaks in fresh processes, checks before speeds.

* Competitors take turns in one process, so that a change of the machine's mood meets all of them.
* Warm-up calls are made, and thrown away, before the first timed one.
* On a GPU times are the device's, taken with events and cold caches (``_gpu.py``).
* Memory is the highest resident set during a call beyond what was resident before it, taken in a fresh
  process by resetting the kernel's high-water mark, after a small call has loaded every library; on a GPU it
  is the allocator's peak. ``allocated`` counts what torch hands out instead: exact, and the same every time.
* ``require_close`` refuses to go on, and so to print any speed, when results disagree.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import _gpu
from tracer import machine as this_machine
from tracer.machine import versions

ROOT = Path(__file__).parents[1]
SOURCES = ("kernels", "tracer", "benchmarks/*.py", "requirements.lock")  # what a number depends on


@dataclass(frozen=True)
class Timing:
    """Seconds: median, 20th and 80th percentile of ``repeats`` calls."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        fifths = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 4
        return cls(statistics.median(seconds), fifths[0], fifths[3], len(seconds))

    def __str__(self) -> str:
        unit, scale = ("s", 1.0) if self.median >= 10 else ("ms", 1e3) if self.median >= 1e-4 else ("µs", 1e6)
        median, low, high = (f"{scale * value:.4g}" for value in (self.median, self.low, self.high))
        return f"{median} {unit} ({low}–{high})"


class HostClock:
    """Wall-clock time between marks."""

    def start(self) -> float:
        return self.mark()

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        """From each mark to the next."""
        return [b - a for a, b in pairwise(marks)]


Phases = Mapping[str, Callable[[], Any]]  # the parts of a call, in their order
TOTAL = "total"  # the sum of the phases


def interleaved_phases(
    calls: Mapping[str, Phases],
    *,
    repeats: int,
    warmup: int = 1,
    budget: float = float("inf"),
    label: str = "",
) -> dict[str, dict[str, Timing]]:
    """Time calls in turns, each phase of a call by itself and their sum as ``TOTAL``.

    Stops early, after at least three turns, when ``budget`` seconds are spent. ``label`` is put before the
    names of call and phase in a GPU profiler's timeline.
    """
    for phases in calls.values():
        for _ in range(warmup):
            for phase in phases.values():
                phase()
    clock: Any = _gpu.EventClock() if torch.cuda.is_available() else HostClock()
    spent: dict[str, dict[str, list[float]]] = {
        name: {part: [] for part in (*phases, TOTAL)} for name, phases in calls.items()
    }
    start = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - start > budget:
            break
        for name, phases in calls.items():
            marks = [clock.start()]
            for part, phase in phases.items():
                with _gpu.named(f"{label}{name}, {part}"):
                    phase()
                marks.append(clock.mark())
            seconds = clock.seconds(marks)
            for part, taken in zip((*phases, TOTAL), (*seconds, sum(seconds)), strict=True):
                spent[name][part].append(taken)
    return {
        name: {part: Timing.of(seconds) for part, seconds in parts.items()} for name, parts in spent.items()
    }


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 1, budget: float = float("inf")
) -> dict[str, Timing]:
    """Time calls of one phase in turns; see :func:`interleaved_phases`."""
    whole = {name: {"call": call} for name, call in calls.items()}
    times = interleaved_phases(whole, repeats=repeats, warmup=warmup, budget=budget)
    return {name: parts[TOTAL] for name, parts in times.items()}


def peak_memory(module: str, function: str, *args: object) -> int:
    """Extra bytes that ``module.function(*args)()`` needs at its peak, in a fresh process.

    ``function`` builds the inputs and returns the call to be measured. On a GPU the allocator's peak is
    taken, on a CPU the resident set's (Linux only). The process is forked from one that has imported
    ``module`` (on a GPU, which does not survive a fork, torch alone) and done nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch" if torch.cuda.is_available() else module])
    # without a name and a file the main module is not run once more in the new process
    without_main = patch.multiple(sys.modules["__main__"], create=True, __spec__=None, __file__=None)
    with without_main, ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_of, module, function, args).result()


def _peak_of(module: str, function: str, args: Sequence[object]) -> int:
    return peak_here(getattr(importlib.import_module(module), function)(*args))


def peak_here(call: Callable[[], Any]) -> int:
    """Extra bytes of ``call`` at its peak, in this process."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed but still resident memory would hide what the call needs
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew from what is resident now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def available_memory() -> int:
    """Bytes that a call could still get: of the GPU, if there is one, else of the machine."""
    if torch.cuda.is_available():
        reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + reserved
    found = [x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable:")]
    return 1024 * int(found[0].split()[1])


# Products whose library takes scratch of its own, as much as it likes on this processor, and returns it.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")


def allocated(call: Callable[[], Any]) -> int:
    """Bytes of CPU memory that torch hands out at the peak of ``call``, beyond what was held before it.

    Counted from the allocator's own record, so the same at every run. What a product's library takes and
    returns within the product is left out: it depends on the processor.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler reports each of its starts
    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.disable()  # nothing that was left behind earlier must be freed meanwhile
    try:
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            call()
    finally:
        gc.enable()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    held = peak = 0
    for change in _changes(results.experimental_event_tree()):
        held += change
        peak = max(peak, held)
    return peak


def _changes(events: Sequence[Any]) -> list[int]:
    """Bytes allocated, and freed as negative numbers, in the order of time."""
    found = []
    for event in sorted(events, key=lambda e: e.start_time_ns):
        if event.name == "[memory]":
            if event.typed[1].device.type == "cpu":
                found.append(event.typed[1].alloc_size)
        elif event.name in _PRODUCTS:
            found.append(sum(_changes(event.children)))
        else:
            found += _changes(event.children)
    return found


class WrongResult(SystemExit):
    """Something that was to be timed computes something else."""


def require_close(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Stop the benchmark, by WrongResult, unless ‖got − expected‖ <= tolerance · ‖expected‖."""
    got, expected = got.double(), expected.double()
    error = float((got - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise WrongResult(
            f"no speed without a right result: {what} is off by {error:.1e}, allowed {tolerance:.0e}"
        )


def environment() -> dict[str, Any]:
    """The machine, the versions, the day and the commit that a number belongs to."""
    return {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": date.today().isoformat(),
        "commit": _commit(),
    }


def machine() -> dict[str, Any]:
    """Processor, cores, memory and GPU, and what the processor multiplies bfloat16 with."""
    return this_machine.machine() | {"bf16": this_machine.bfloat16_unit()}


def describe(machine: Mapping[str, Any]) -> str:
    """The machine in words, as a table names it."""
    bf16 = f", bf16 with {machine['bf16']}" if machine["bf16"] else ""
    host = f"{machine['cores']} cores of {machine['processor']}{bf16}, {machine['memory_gib']:.0f} GiB"
    return f"{machine['gpu']}; {host}" if machine["gpu"] else f"{host}, no GPU"


def _commit() -> str:
    """Of the checkout that is measured; ``+`` where files differ from it."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], capture_output=True, text=True, check=False, cwd=ROOT)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, columns aligned for a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
    )
