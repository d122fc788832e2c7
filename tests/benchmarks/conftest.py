"""Fixtures that the tests of the benchmarks share."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import page
from benchmarks.harness import Highlight

collect_ignore = [] if torch.cuda.is_available() else ["test_gpu.py"]  # these run on a GPU alone

HERE = {"processor": "Intel(R) Xeon(R) Processor", "cores": 2, "memory_gib": 23.5, "gpu": None, "bf16": "AMX"}
ABOUT = {"machine": HERE, "versions": {"torch": "2.14.1"}, "date": "2026-01-02", "commit": "abc1234"}


@pytest.fixture
def here():
    """Return a machine."""
    return HERE


@pytest.fixture
def part(monkeypatch):
    """Replace the part losses by one that measures nothing; return what writes results as its process would."""
    module = ModuleType("benchmarks.losses", "Sums of TRACER and of others.\n\nMore.")
    module.PICTURES = {"sums": "Bars: sums."}
    module.report = lambda results: f"| sum | {results['sum']} |"
    module.highlights = lambda results: [Highlight("sum", "1 ms", "others: 3 ms", "3.0×")]
    module.figures = lambda results: {"sums": Figure()}
    module.exact = lambda results: {"sum": results["sum"]}
    module.ratios = lambda results: {"sum vs others": results["ratio"]}
    monkeypatch.setitem(sys.modules, "benchmarks.losses", module)
    monkeypatch.setattr(page, "README_PICTURES", {"losses": "sums"})

    def results(total=4.0, ratio=3.0):
        return {**ABOUT, "results": {"sum": total, "ratio": ratio}}

    return results
