"""``pytest benchmarks --benchmark-only``: counting the kernels' work, and what was counted."""

from __future__ import annotations

from benchmarks import work
from benchmarks._part import run_part


def test_work(benchmark):
    """In a process of its own, which interprets."""
    results = benchmark.pedantic(lambda: run_part("work", quick=True)["results"], rounds=1)
    benchmark.extra_info |= work.exact(results)
