"""Exact numbers of a part beside the committed ones, for the tests of the parts that time nothing."""

from __future__ import annotations

from typing import Any

from benchmarks.check import committed_results, differing
from benchmarks.harness import RESULTS, Part


def differences(part: str, results: dict[str, Any]) -> list[str]:
    """A line for each number that is not as committed: ``make bench`` writes them down."""
    committed = committed_results(RESULTS, same_machine=False)["parts"][part]["results"]
    exact = Part(part).exact
    numbers = exact(results)
    assert numbers, f"{part} has no exact numbers"
    return differing(exact(committed), numbers)
