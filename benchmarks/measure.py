"""Instruments that measure time and memory and compare results.

* Competitors take turns in one process, so that a change in the machine's speed affects all of them alike.
* Warm-up calls come before the first timed call and are not counted.
* On a GPU the times are the device's, taken with events and cold caches (``gpu.py``).
* Peak memory is the highest resident set during a call beyond what was resident before it. It is measured in a
  fresh process by resetting the kernel's high-water mark after a small call has loaded every library; on a GPU
  it is the allocator's peak.
* ``allocated`` counts instead the bytes that torch hands out: an exact number, the same in every run.
* ``require_close`` stops the benchmark, before any speed is printed, where results disagree.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import gpu


@dataclass(frozen=True)
class Timing:
    """Median, 20th and 80th percentile of ``repeats`` calls, in seconds."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise the seconds of several calls."""
        fifths = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 4
        return cls(statistics.median(seconds), fifths[0], fifths[3], len(seconds))

    def __str__(self) -> str:
        unit, scale = ("s", 1.0) if self.median >= 10 else ("ms", 1e3) if self.median >= 1e-4 else ("µs", 1e6)
        median, low, high = (f"{scale * value:.4g}" for value in (self.median, self.low, self.high))
        return f"{median} {unit} ({low}–{high})"


class HostClock:
    """A clock that measures wall-clock time between marks."""

    def start(self) -> float:
        """Return the first mark."""
        return self.mark()

    def mark(self) -> float:
        """Return a mark of the present moment."""
        return time.perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        """Return the seconds from each mark to the next."""
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
    """Time calls in turns and return, by call and phase, the time of each phase and of their sum as ``TOTAL``.

    The turns end early, after at least three, once they have taken ``budget`` seconds. A GPU profiler's
    timeline shows ``label`` before the names of call and phase.
    """
    for phases in calls.values():
        for _ in range(warmup):
            for phase in phases.values():
                phase()
    clock: Any = gpu.EventClock() if torch.cuda.is_available() else HostClock()
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
                with gpu.timeline_range(f"{label}{name}, {part}"):
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
    """Time calls of a single phase in turns; see :func:`interleaved_phases`."""
    whole = {name: {"call": call} for name, call in calls.items()}
    times = interleaved_phases(whole, repeats=repeats, warmup=warmup, budget=budget)
    return {name: parts[TOTAL] for name, parts in times.items()}


def peak_memory(module: str, function: str, *args: object) -> int:
    """Return the extra bytes that ``module.function(*args)()`` needs at its peak, measured in a fresh process.

    ``function`` builds the inputs and returns the call to be measured. On a GPU the number is the allocator's
    peak, on a CPU that of the resident set (Linux only). The process is forked from one that has imported
    ``module`` and done nothing else; on a GPU, whose state does not survive a fork, from one that has imported
    torch alone.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch" if torch.cuda.is_available() else module])
    # Without a name and a file the main module is not run again in the new process.
    without_main = patch.multiple(sys.modules["__main__"], create=True, __spec__=None, __file__=None)
    with without_main, ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_of, module, function, args).result()


def _peak_of(module: str, function: str, args: Sequence[object]) -> int:
    return peak_here(getattr(importlib.import_module(module), function)(*args))


def peak_here(call: Callable[[], Any]) -> int:
    """Return the extra bytes that ``call`` needs at its peak, measured in this process."""
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
    raise RuntimeError(f"/proc/self/status has no field {field}: peak memory can be measured on Linux only")


def available_memory() -> int:
    """Return the bytes that a call could still allocate: on the GPU if there is one, else on the machine."""
    if torch.cuda.is_available():
        reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + reserved
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])


# Products whose library allocates and frees scratch memory of its own; how much depends on the processor.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")


def allocated(call: Callable[[], Any]) -> int:
    """Return the bytes of CPU memory that torch hands out at the peak of ``call``, beyond what was held before.

    The number comes from the allocator's own record and is the same in every run. The scratch memory of matrix
    products is left out, since it depends on the processor.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler logs each start
    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.disable()  # garbage from earlier must not be freed meanwhile
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
    """Return the bytes of each allocation, negative for each release, in the order of time."""
    changes = []
    for event in sorted(events, key=lambda e: e.start_time_ns):
        if event.name == "[memory]":
            if event.typed[1].device.type == "cpu":
                changes.append(event.typed[1].alloc_size)
        elif event.name in _PRODUCTS:
            changes.append(sum(_changes(event.children)))
        else:
            changes += _changes(event.children)
    return changes


class WrongResult(SystemExit):
    """A competitor computes something other than the reference, so it must not be timed."""

    def __init__(self, what: str) -> None:
        super().__init__(f"wrong result, so nothing was timed: {what}")


def require_close(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Check that ‖got − expected‖ <= tolerance · ‖expected‖.

    Raises:
        WrongResult: it is not; ends the benchmark, since a wrong result must not get a speed.
    """
    got, expected = got.double(), expected.double()
    error = float((got - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise WrongResult(f"{what} is off by {error:.1e}, allowed {tolerance:.0e}")
