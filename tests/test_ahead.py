"""Gathers that begin before the loss, on 2 ranks (gloo): cases are in ahead_cases.py."""

from __future__ import annotations

import ahead_cases
import pytest
import torch
import world

from tracer.ops import Ahead, contrastive_loss

outcomes = world.outcomes("ahead_cases")
CASES = [(ranks, name) for ranks in (2,) for name in ahead_cases.cases(ranks)]


@pytest.mark.parametrize(("ranks", "case"), CASES, ids=[f"{ranks}-ranks-{name}" for ranks, name in CASES])
def test_gathers_ahead(outcomes, ranks, case):
    world.check(outcomes, ranks, case)


def test_one_process_gathers_nothing():
    x = torch.eye(4)
    with Ahead(None, 4, 4) as ahead:
        ahead.begin(text=x)
        assert ahead.begun == {}
        assert torch.equal(contrastive_loss(x, x, 1.0, ahead=ahead).loss, contrastive_loss(x, x, 1.0).loss)
