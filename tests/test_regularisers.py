"""The terms of published methods against their definitions in float64 loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tracer.ops import contrastive_loss
from tracer.regularisers import contrastive_gradients, gradient_distance, l2_sp, ldreg, local_dimension


def features(rows, seed, width=16):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=draw, dtype=torch.float64), dim=1)


def test_l2_sp():
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, generator=draw), torch.randn(5, generator=draw)]
    weights = [(s + n + 1).requires_grad_() for n, s in enumerate(start)]
    loss = l2_sp(weights, start)
    assert loss.item() == pytest.approx(0.5 * (12 * 1 + 5 * 4), rel=1e-6)
    loss.backward()
    for n, w in enumerate(weights):
        torch.testing.assert_close(w.grad, torch.full_like(w, n + 1.0))
    with pytest.raises(ValueError, match="no weights train"):
        l2_sp([], [])


@pytest.mark.parametrize(("rows", "k"), [(40, 8), (20, 64)])
def test_local_dimension_is_its_definition(rows, k):
    x = features(rows, 1)
    expected = []
    for i in range(rows):
        others = sorted(math.dist(x[i].tolist(), x[j].tolist()) for j in range(rows) if j != i)[:k]
        mean = sum(others) / len(others)
        expected.append(mean / (others[-1] - mean))
    torch.testing.assert_close(local_dimension(x, k), torch.tensor(expected, dtype=torch.float64))
    assert float(ldreg(x, k)) == pytest.approx(-sum(map(math.log, expected)) / rows)


def test_local_dimension_finds_the_dimension_and_its_gradient_is_right():
    draw = torch.Generator().manual_seed(0)
    flat = (
        torch.rand(2000, 2, generator=draw, dtype=torch.float64) @ torch.randn(2, 30, generator=draw).double()
    )
    assert float(local_dimension(flat, 64).median()) == pytest.approx(2, abs=0.3)
    assert torch.autograd.gradcheck(lambda x: ldreg(x, 5), features(9, 2).requires_grad_())
    equal = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)  # rows that are equal
    ldreg(equal, 3).backward()
    assert equal.grad.isfinite().all()
    with pytest.raises(ValueError, match="2 rows of features and 2 neighbours: at least 3 rows"):
        ldreg(features(2, 0), 2)


@pytest.mark.parametrize("labelled", [False, True])
def test_gradients_are_those_of_the_contrastive_loss(labelled):
    u, v = features(12, 3).requires_grad_(), features(12, 4).requires_grad_()
    labels = torch.arange(12) % 5 if labelled else None
    loss = contrastive_loss(u, v, 7.0, labels=labels, impl="eager").loss
    expected = torch.autograd.grad(loss, (u, v))
    for got, want in zip(contrastive_gradients(u, v, 7.0, labels), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_gradient_distance_is_its_definition_and_differentiable():
    u, v, a, b = (features(6, seed, 4) for seed in range(4))
    sigma = torch.tensor(5.0, dtype=torch.float64)
    g, h = contrastive_gradients(u, v, sigma), contrastive_gradients(a, b, sigma)
    expected = sum(
        sum((float(x) - float(y)) ** 2 for x, y in zip(m.flatten(), n.flatten(), strict=True)) / 24
        for m, n in zip(g, h, strict=True)
    )
    assert float(gradient_distance((u, v, sigma), (a, b, sigma))) == pytest.approx(expected)
    assert float(gradient_distance((u, v, sigma), (u, v, sigma))) == 0
    inputs = (u.requires_grad_(), v.requires_grad_(), sigma.requires_grad_())
    assert torch.autograd.gradcheck(lambda *s: gradient_distance(s, (a, b, 5.0)), inputs)
