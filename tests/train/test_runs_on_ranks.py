"""Runs on 2 and 3 ranks train what one process does: see run_cases.py for the cases."""

from __future__ import annotations

import pytest
import run_cases
import world

outcomes = world.outcomes("run_cases")


@pytest.mark.parametrize(
    ("ranks", "case"), [(ranks, name) for ranks in (2, 3) for name in run_cases.cases(ranks)]
)
def test_a_run_on_ranks(outcomes, ranks, case):
    world.check(outcomes, ranks, case)
