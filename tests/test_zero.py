"""The teacher under DeepSpeed's ZeRO stages 0 to 3, on 1, 2 and 4 ranks; the cases are in zero_cases.py."""

from __future__ import annotations

import pytest
import world
import zero_cases

CASES = [(ranks, name) for ranks in (1, 2, 4) for name in zero_cases.cases(ranks)]

outcomes = world.outcomes("zero_cases")


@pytest.mark.parametrize(("ranks", "case"), CASES, ids=[f"{ranks}-ranks-{name}" for ranks, name in CASES])
def test_teacher_under_zero(outcomes, ranks, case):
    world.check(outcomes, ranks, case)
