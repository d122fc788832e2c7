"""Frozen weights on a CPU: each matrix is multiplied once, as one that trains is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from adapter_models import KINDS, adapted, build, features, randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tracer._frozen import multiply_once
from tracer.models.freezing import freeze
from tracer.train.engine import mixed_precision


@pytest.fixture(autouse=True)
def linear_of_torch(monkeypatch):
    """DeepSpeed's stage 3 leaves a function of its own in place of torch's, after its engine has gone too."""
    monkeypatch.setattr(nn.functional, "linear", torch._C._nn.linear)


class Repeated(TorchDispatchMode):
    """Notes batched products of which one operand is a single matrix, repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            operands = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.shapes += [tuple(x.shape) for x in operands if len(x) > 1 and x.stride(0) == 0]
        return func(*args, **(kwargs or {}))


def repeated(model: nn.Module, precision: str) -> list[tuple[int, ...]]:
    """Return the shapes of the repeated matrices of a training step's forward and backward pass."""
    with Repeated() as products:
        with mixed_precision(torch.device("cpu"), precision):
            u, v = features(model.train())
        if u.requires_grad or v.requires_grad:
            (u.float().sum() + v.float().sum()).backward()
    return products.shapes


@pytest.mark.parametrize("kind", KINDS)
def test_no_frozen_matrix_is_repeated(kind):
    """Adapters in both towers, and towers that are frozen as a whole, in both precisions."""
    frozen = build(kind)
    freeze(frozen, "image")
    for model in (adapted(kind), frozen):
        for precision in ("fp32", "amp_bf16"):
            assert repeated(model, precision) == []


def test_torch_repeats_a_frozen_matrix_by_itself():
    """The reason for all this: where it fails, torch has learnt better."""
    assert repeated(build().requires_grad_(False), "amp_bf16") != []


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_features_and_gradients_are_those_of_weights_that_train(precision):
    """Up to rounding: a bias is then added within the product."""
    model = adapted(drop=0.0)
    randomise(model)
    whole = copy.deepcopy(model).requires_grad_(True)
    adapters = [name for name, p in model.named_parameters() if p.requires_grad]
    results = []
    for each in (model, whole):
        with mixed_precision(torch.device("cpu"), precision):
            u, v = (x.float() for x in features(each.train()))
        (u[:, 0].sum() + v[:, 1].sum()).backward()
        results.append([u, v, *(each.get_parameter(name).grad for name in adapters)])
    close = {"rtol": 1e-4, "atol": 1e-6} if precision == "fp32" else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(*results, **close)


def test_separate_projections_and_one_that_is_not_in_batches():
    """Keys and values of another width, three different tensors, and a single sequence [L, D]."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, kdim=24, vdim=8, batch_first=True)
    q, k, v = torch.randn(3, 5, 16), torch.randn(3, 7, 24), torch.randn(3, 7, 8)
    expected = attention(q, k, v)[0]
    of_one = attention(q[0], k[0], v[0])[0]
    multiply_once(attention.requires_grad_(False))
    with Repeated() as products:
        torch.testing.assert_close(attention(q, k, v)[0], expected)
    assert products.shapes == []
    torch.testing.assert_close(attention(q[0], k[0], v[0])[0], of_one)
    whole = nn.MultiheadAttention(16, 2, batch_first=True)
    q, k, v = (torch.randn(3, 5, 16) for _ in range(3))
    expected = whole(q, k, v)[0]
    multiply_once(whole.requires_grad_(False))
    torch.testing.assert_close(whole(q, k, v)[0], expected)
    torch.testing.assert_close(whole(query=q, key=k, value=v)[0], expected)  # by name: as torch does it


def test_a_second_call_and_copies_change_nothing():
    model = build().requires_grad_(False)
    multiply_once(model)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    multiply_once(model)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert repeated(copied, "amp_bf16") == []
