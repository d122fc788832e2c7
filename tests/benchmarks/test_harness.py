"""What the parts of the benchmarks share: their interface, process and output."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest

from benchmarks.harness import Part, PartFailed, library_output_to_stderr, run_part


def test_what_a_part_does_not_define_is_nothing(monkeypatch):
    module = ModuleType("benchmarks.nothing", "Nothing at all.\n\nMore.")
    monkeypatch.setitem(sys.modules, "benchmarks.nothing", module)
    part = Part("nothing")
    assert part.title == "Nothing at all."
    assert part.highlights({}) == []
    assert part.figures({}) == part.exact({}) == part.ratios({}) == part.pictures == {}


def test_a_part_that_fails_is_named(capfd):
    with pytest.raises(
        PartFailed, match=r"part nothing failed with exit code 1: run python -m benchmarks.nothing to see why"
    ):
        run_part("nothing", quick=True)
    assert "No module named benchmarks.nothing" in capfd.readouterr().err


def test_the_standard_output_holds_results_alone(capfd):
    """Libraries, and the processes that they start, would print there too."""
    with library_output_to_stderr():
        os.write(1, b"a library's\n")
    os.write(1, b"results\n")
    assert capfd.readouterr() == ("results\n", "a library's\n")
