"""Measuring that can be trusted: interleaved medians, peaks in fresh processes, checks before speeds.

* Competitors take turns in one process, so that a change of the machine's mood meets all of them.
* Warm-up calls are made, and thrown away, before the first timed one.
* Memory is the highest resident set during a call beyond what was resident before it, taken in a fresh
  process by resetting the kernel's high-water mark, after a small call has loaded every library.
* ``require_close`` refuses to go on, and so to print any speed, when results disagree.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Timing:
    """Seconds: median, 20th and 80th percentile of ``repeats`` calls."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        fifths = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 4
        return cls(statistics.median(seconds), fifths[0], fifths[3], len(seconds))

    def __str__(self) -> str:
        return f"{1e3 * self.median:.1f} ms ({1e3 * self.low:.1f}–{1e3 * self.high:.1f})"


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 1, budget: float = float("inf")
) -> dict[str, Timing]:
    """Time the calls in turns. Stops early, after at least three turns, when ``budget`` seconds are spent."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    spent: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - start > budget:
            break
        for name, call in calls.items():
            _synchronize()
            before = time.perf_counter()
            call()
            _synchronize()
            spent[name].append(time.perf_counter() - before)
    return {name: Timing.of(seconds) for name, seconds in spent.items()}


def peak_memory(module: str, function: str, *args: object) -> int:
    """Extra bytes that ``module.function(*args)()`` needs at its peak, in a fresh process.

    ``function`` builds the inputs and returns the call to be measured. On a GPU the allocator's peak is
    taken, on a CPU the resident set's (Linux only).
    """
    command = [sys.executable, "-m", "benchmarks._measure", module, function, json.dumps(args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"measuring {module}.{function}{args} failed: {done.stderr.strip().splitlines()[-1]}"
        )
    return int(done.stdout.split()[-1])


def _peak_here(call: Callable[[], Any]) -> int:
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


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def require_close(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Stop the benchmark unless ‖got − expected‖ <= tolerance · ‖expected‖."""
    got, expected = got.double(), expected.double()
    error = float((got - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise SystemExit(
            f"no speed without a right result: {what} is off by {error:.1e}, allowed {tolerance:.0e}"
        )


def environment() -> dict[str, str]:
    """The machine and the versions that a number belongs to."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, columns aligned for a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def plain(value: Any) -> Any:
    """Timings as dictionaries, for JSON."""
    return asdict(value) if isinstance(value, Timing) else value


if __name__ == "__main__":
    _module, _function, _args = sys.argv[1:]
    print(_peak_here(getattr(importlib.import_module(_module), _function)(*json.loads(_args))))
