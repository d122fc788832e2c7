"""The records of the loss: what every implementation gives back, beside the definition."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import FULL, options, problem, to_device
from three_runs import SLACK, error

from tracer.kernels import contrastive_blocked, contrastive_eager, contrastive_triton
from tracer.kernels.contrastive import (
    TERMS,
    Gradients,
    Inputs,
    Needs,
    Options,
    Statistics,
    diagnostic_names,
    teacher_factor,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

IMPLEMENTATIONS = pytest.mark.parametrize("module", [contrastive_blocked, contrastive_triton])


def test_fields_that_belong_together_have_one_name():
    assert Needs._fields == Gradients._fields
    assert set(Needs._fields) <= set(Inputs._fields)
    assert set(TERMS) <= set(Options._fields)


@IMPLEMENTATIONS
@pytest.mark.parametrize("terms", [FULL, FULL[:1], FULL[1:2], FULL[2:3]], ids=str)
def test_saved_statistics_equal_the_definition(module, terms):
    """Wherever the definition has a log-sum-exp; the cut between forward and backward is the same for all."""
    inputs = problem(40, 33, 16)
    chosen = options(0.3, 0.1, terms, teacher_temperature=1.5)
    saved = module.forward(to_device(inputs), chosen).saved
    needed = {
        "lse_z": chosen.contrastive,
        "lse_s": chosen.relational,
        "lse_t": chosen.relational or chosen.cross,
        "lse_x": chosen.crossed,
        "positives": True,
    }
    for got, want in zip(saved, contrastive_eager.statistics(inputs, chosen), strict=True):
        assert got.shape == want.shape == (len(Statistics._fields), got.shape[1])
        for name, ours, truth in zip(Statistics._fields, got, want, strict=True):
            if needed[name] and (name != "positives" or chosen.contrastive or chosen.interactive):
                assert error(ours, truth) < SLACK[torch.float32], name


@IMPLEMENTATIONS
def test_backward_takes_statistics_from_anywhere(module):
    """Gradients from the definition's statistics: what the ranks of a batch will hand each other."""
    inputs, chosen = problem(40, 33, 16), options(0.3, 0.1)
    moved, weights = to_device(inputs), torch.tensor([1.0, 0.5, 2.0, -1.0])
    saved = contrastive_eager.statistics(inputs, chosen)
    exact = type(saved)(*(x.float().to(moved.image.device) for x in saved))
    weights = weights.to(moved.image.device)
    got = module.backward(weights, moved, exact, chosen, Needs())
    own = module.backward(weights, moved, module.forward(moved, chosen).saved, chosen, Needs())
    assert all(error(a, b) < 1e-5 for a, b in zip(got, own, strict=True))


@IMPLEMENTATIONS
@pytest.mark.parametrize("teacher", [False, True])
def test_diagnostics_have_a_name_each(module, teacher):
    inputs = to_device(problem(9, 9, 8, teacher=teacher))
    chosen = options(terms=TERMS[:1], stats=True)
    assert len(module.forward(inputs, chosen).diagnostics) == len(diagnostic_names(teacher))
    assert len(contrastive_eager.contrastive_terms(inputs, chosen)[1]) == len(diagnostic_names(teacher))


def test_the_temperature_divides_in_the_accumulation_dtype():
    inputs = to_device(problem(4, 4, 8), torch.bfloat16)
    factor = teacher_factor(inputs, Options(teacher_temperature=3.0))
    assert factor.dtype == torch.float32
    assert factor == inputs.teacher_logit_scale / 3.0
    assert teacher_factor(inputs._replace(teacher_logit_scale=None), Options()) is None
