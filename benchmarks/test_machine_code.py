"""``pytest benchmarks --benchmark-only``: compiling the shipped configurations; the worst of each architecture."""

from __future__ import annotations

from benchmarks import machine_code
from benchmarks._part import run_part


def test_machine_code(benchmark):
    """In a process of its own, which compiles: this one may interpret."""
    results = benchmark.pedantic(lambda: run_part("machine_code", quick=True)["results"], rounds=1)
    for arch in machine_code.ARCHITECTURES:
        kernels = [row for row in results["kernels"] if row["architecture"] == arch]
        benchmark.extra_info[arch] = {
            "kernels": len(kernels),
            "spilled": sum(row["spilled"] for row in kernels),
            "registers": max(row["registers"] for row in kernels),
            "resident_warps": min(row["resident_warps"] for row in kernels),
        }
