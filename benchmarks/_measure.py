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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tracer import log
from tracer.log import versions

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
        fifths = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 4
        return cls(statistics.median(seconds), fifths[0], fifths[3], len(seconds))

    def __str__(self) -> str:
        unit, scale = ("s", 1.0) if self.median >= 10 else ("ms", 1e3) if self.median >= 1e-4 else ("µs", 1e6)
        median, low, high = (f"{scale * value:.4g}" for value in (self.median, self.low, self.high))
        return f"{median} {unit} ({low}–{high})"


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
    amx, avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    return log.machine() | {"bf16": "AMX" if amx else "AVX-512" if avx512 else None}


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


def plain(value: Any) -> Any:
    """Timings as dictionaries, for JSON."""
    return asdict(value) if isinstance(value, Timing) else value


if __name__ == "__main__":
    _module, _function, _args = sys.argv[1:]
    print(_peak_here(getattr(importlib.import_module(_module), _function)(*json.loads(_args))))
