"""The loss over the batches of 2, 3, 4 and 6 ranks (gloo), against one process: see ranks_cases.py for the cases."""

from __future__ import annotations

import pytest
import ranks_cases
import torch
import world

from tracer._mesh import default_shape
from tracer.ops import contrastive_loss

outcomes = world.outcomes("ranks_cases")
CASES = [(ranks, name) for ranks in (2, 3, 4, 6) for name in ranks_cases.cases(ranks)]


@pytest.mark.parametrize(("ranks", "case"), CASES, ids=[f"{ranks}-ranks-{name}" for ranks, name in CASES])
def test_loss_over_ranks(outcomes, ranks, case):
    world.check(outcomes, ranks, case)


@pytest.mark.parametrize(
    ("ranks", "per_host", "shape"),
    [(2, 2, (2, 1)), (4, 4, (2, 2)), (6, 6, (3, 2)), (7, 7, (7, 1)), (64, 8, (8, 8)), (1024, 8, (128, 8)),
     (6, 4, (3, 2)), (4, 1, (4, 1))],
)  # fmt: skip
def test_default_mesh(ranks, per_host, shape):
    """The squarest on one host, the ranks of a host on several; hosts of unequal size count as none."""
    assert default_shape(ranks, per_host) == shape


def test_something_else_than_a_group_is_refused():
    x = torch.eye(4)
    with pytest.raises(
        ValueError, match=r"group must be a torch.distributed.ProcessGroup or None, got 'world'"
    ):
        contrastive_loss(x, x, 1.0, group="world")
