"""Calls of the sigmoid form below the dispatcher, for tests: by the definition and by both walks."""

from __future__ import annotations

import torch
from kernel_calls import FULL, SMALL, options, to_device
from three_runs import SLACK, assert_no_worse
from triton_interpreter import DEVICE

from tracer.kernels import contrastive_eager, sigmoid_blocked, sigmoid_triton
from tracer.kernels.contrastive import Biases, Inputs, Options
from tracer.kernels.sigmoid import PairNeeds, Pairs

WALKS = {"blocked": sigmoid_blocked.walk, "triton": sigmoid_triton.walk}
ALL = PairNeeds(*[True] * 5)
UPSTREAM = torch.tensor([1.3, -0.4, 0.0, 0.0], dtype=torch.float64)


def pairwise(terms: tuple[str, ...] = FULL[:2], margin: float = 0.2, **others) -> Options:
    return options(margin, 0.0, terms, sigmoid=True, **others)


def biases(bias: float = -4.0, teacher_bias: float = -3.0) -> Biases:
    return Biases(*(torch.tensor(b, dtype=torch.float64) for b in (bias, teacher_bias)))


def by_definition(
    inputs: Inputs, b: Biases, chosen: Options, upstream: torch.Tensor | None = UPSTREAM
) -> dict[str, torch.Tensor]:
    """Return the sums over pairs and their gradients by the definition, at the dtype of the inputs."""
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in PairNeeds._fields[1:4]}
    bias = b.logit_bias.clone().requires_grad_()
    made = inputs._replace(**leaves)
    terms, _ = contrastive_eager.contrastive_terms(made, chosen, b._replace(logit_bias=bias))
    sums = len(inputs.image) * terms
    value = sums.sum() if upstream is None else (upstream.to(sums) * sums).sum()
    gradients = torch.autograd.grad(value, [*leaves.values(), bias], materialize_grads=True)
    return dict(zip(Pairs._fields, (sums.detach(), *gradients), strict=True))


def by_walk(impl: str, inputs: Inputs, b: Biases, chosen: Options, dtype=torch.float32, **how) -> Pairs:
    moved = to_device(inputs, dtype)
    on_device = Biases(*(x.to(DEVICE, moved.logit_scale.dtype) for x in b))
    if impl == "triton":
        how = {"tile": SMALL} | how
    upstream = how.pop("upstream", UPSTREAM)
    upstream = None if upstream is None else upstream.float().to(DEVICE)
    return WALKS[impl](moved, on_device, chosen, how.pop("needs", ALL), upstream, **how)


def check(impl: str, inputs: Inputs, b: Biases, chosen: Options, slack=None, dtype=torch.float32, **how):
    """Assert the rule of :mod:`three_runs` for sums and gradients."""
    upstream = how.get("upstream", UPSTREAM)
    truth = by_definition(inputs, b, chosen, upstream)
    on_device = Biases(*(x.to(DEVICE, torch.float32) for x in b))
    by_torch = by_definition(to_device(inputs, dtype), on_device, chosen, upstream)
    ours = by_walk(impl, inputs, b, chosen, dtype, **how)._asdict()
    assert all(x.dtype == torch.float32 for x in ours.values())
    assert_no_worse(ours, by_torch, truth, SLACK[dtype] if slack is None else slack)
