"""Calls of the loss's implementations below the dispatcher, on records, for tests."""

from __future__ import annotations

from typing import Any

import torch
from three_runs import SLACK, assert_no_worse
from torch import Tensor
from triton_interpreter import DEVICE

from tracer.kernels import contrastive_eager, contrastive_triton
from tracer.kernels._tiles import Tile
from tracer.kernels.contrastive import TERMS, Forward, Gradients, Inputs, Needs, Options

# Small tiles, unequal in their sides: rectangles of several tiles and ragged edges at small sizes.
SMALL = Tile(16, 32, 16, 4, 1)
# One pair; less than one tile; N ≠ M across several rectangles, ragged in every direction; whole tiles.
SIZES = [(1, 1, 8), (5, 3, 16), (70, 130, 40), (64, 64, 64)]
FULL, CLIP = TERMS, TERMS[:1]
ALL = Needs()


def options(
    margin: float = 0.0, smoothing: float = 0.0, terms: tuple[str, ...] = FULL, **others: Any
) -> Options:
    """Return options with these terms enabled and no other."""
    return Options(margin, smoothing, **{name: name in terms for name in TERMS}, **others)


def unit(rows: int, width: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return normalised features, exactly representable in ``dtype``, in float64."""
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return (x / x.norm(dim=1, keepdim=True)).to(dtype).double()


def problem(
    N: int, M: int, D: int, *, dtype=torch.float32, labels: Any = "some", teacher=True, scale=10.0, seed=0
) -> Inputs:
    """Return inputs in float64 on the CPU; every image has a positive text, and every text an image."""
    generator = torch.Generator().manual_seed(seed)
    image, text, teacher_image, teacher_text = (unit(n, D, generator, dtype) for n in (N, M, N, M))
    if labels == "some":
        classes = max(1, min(N, M) // 3)
        # far above 2^32: neither half of an int64 tells classes apart alone
        rows = torch.randperm(N, generator=generator) % classes * (2**32 + 1)
        cols = torch.randperm(M, generator=generator) % classes * (2**32 + 1)
    else:
        rows, cols = labels if labels is not None else (None, None)
    inputs = Inputs(image, text, torch.tensor(scale, dtype=torch.float64), labels=rows, text_labels=cols)
    if not teacher:
        return inputs
    teacher_scale = torch.tensor(0.8 * scale, dtype=torch.float64)
    return inputs._replace(
        teacher_image=teacher_image, teacher_text=teacher_text, teacher_logit_scale=teacher_scale
    )


def to_device(inputs: Inputs, dtype: torch.dtype = torch.float32) -> Inputs:
    """Return the inputs on the device under test, features in ``dtype`` and scales in float32."""

    def move(x: Tensor | None) -> Tensor | None:
        if x is None or not x.is_floating_point():
            return None if x is None else x.to(DEVICE)
        return x.to(DEVICE, dtype if x.ndim else torch.float32)

    return Inputs(*map(move, inputs))


def by_definition(inputs: Inputs, chosen: Options, weights: Tensor) -> dict[str, Tensor]:
    """Return terms, diagnostics and the gradients of ``dot(weights, terms)`` by the definition, at its dtype."""
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in Needs._fields}
    terms, diagnostics = contrastive_eager.contrastive_terms(inputs._replace(**leaves), chosen)
    used = weights.to(terms) * torch.tensor([getattr(chosen, name) for name in TERMS]).to(terms.device)
    grads = torch.autograd.grad(
        (used * terms).sum(), tuple(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return {"terms": terms.detach(), "diagnostics": diagnostics, **dict(zip(leaves, grads, strict=True))}


def by_kernels(
    inputs: Inputs,
    chosen: Options,
    weights: Tensor,
    *,
    needs=ALL,
    dtype=torch.float32,
    tile=SMALL,
    backward_tile: Tile | None = None,
    **how: Any,
) -> tuple[Forward, Gradients]:
    """Return what the Triton launchers return, with ``tile`` for both passes or the first; None: the table's."""
    moved = to_device(inputs, dtype)
    forward = contrastive_triton.forward(moved, chosen, tile=tile)
    weights = weights.float().to(DEVICE)
    return forward, contrastive_triton.backward(
        weights, moved, forward.saved, chosen, needs, tile=backward_tile or tile, **how
    )


def check(
    inputs: Inputs, chosen: Options, *, slack: float | None = None, grad_slack: float | None = None,
    dtype: torch.dtype = torch.float32, **how: Any,
) -> None:  # fmt: skip
    """Assert the rule of :mod:`three_runs` for terms, diagnostics and gradients of the Triton kernels.

    Products are exact in float32 whatever the dtype, so terms and diagnostics have float32's slack; gradients are
    rounded to the dtype.
    """
    weights = torch.tensor([1.3, 0.7, -0.4, 2.1], dtype=torch.float64)
    truth = by_definition(inputs, chosen, weights)
    by_torch = by_definition(to_device(inputs, dtype), chosen, weights)
    forward, gradients = by_kernels(inputs, chosen, weights, dtype=dtype, **how)
    ours = {"terms": forward.terms, "diagnostics": forward.diagnostics, **gradients._asdict()}
    for name, x in gradients._asdict().items():
        assert x.dtype == (torch.float32 if name == "logit_scale" else dtype)
    slack = SLACK[torch.float32] if slack is None else slack
    slacks = dict.fromkeys(Needs._fields, max(slack, SLACK[dtype]) if grad_slack is None else grad_slack)
    for name in ours:
        only = ({name: run[name]} for run in (ours, by_torch, truth))
        assert_no_worse(*only, slacks.get(name, slack))
