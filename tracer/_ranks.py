"""The contrastive terms over the batches of all ranks of a mesh, and their gradients.

1. Features are gathered in the rank's mesh row (images) and mesh column (texts), unless that began before
   (``_ahead.py``), or texts travel a ring.
2. The rank walks over its rectangle, which yields the statistics of its rows and columns over these logits alone.
3. Each row's and column's statistics go to the rank that owns it, which merges them in rank order.
4. The owner knows its whole rows and columns: its share of each term, and what the backward pass needs of them.
5. The shares are added in rank order, on every rank alike; final statistics go back into mesh rows and columns.
6. Backward, the rank walks over its rectangle once more, and gradients go to their owners, which add them up.

Collectives lie between the custom operators, not in them, so that the compiler and byte counters see them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tracer import _rectangle, _ring
from tracer._agreement import Sizes
from tracer._collectives import arrived, gather
from tracer._mesh import Mesh
from tracer.kernels import _statistics, contrastive_eager
from tracer.kernels._statistics import Counted, Side, Whole
from tracer.kernels.contrastive import Biases, Inputs, Needs, Options, Saved, accumulation_dtype


def contrastive_terms(
    impl: str, inputs: Inputs, options: Options, mesh: Mesh, sizes: Sizes, begun: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the terms of the global batch, differentiable once, and the diagnostics, alike on all ranks.

    ``inputs`` are this rank's, and ``begun`` the gathers of them that began before. An engine averages gradients
    over the R ranks, so those of the features, which only their rank has, carry the factor R; that of logit_scale,
    which every rank has whole, carries none.
    """
    asked = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return _Terms.apply(impl, mesh, sizes, begun, options, asked, *inputs)


def by_definition(
    inputs: Inputs, options: Options, biases: Biases | None, mesh: Mesh, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """Return what :func:`contrastive_terms` does by the definition, which every rank computes as a whole."""
    everyones = _gathered_with_gradient(inputs, mesh, sizes)
    return contrastive_eager.contrastive_terms(everyones, options, biases)


def sum_over_ranks(x: Tensor, mesh: Mesh) -> Tensor:
    """Return the sum of a scalar over the ranks, in rank order; its gradient carries the factor R."""
    return _SumOverRanks.apply(x, mesh)


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        impl: str,
        mesh: Mesh,
        sizes: Sizes,
        begun: Mapping[str, Tensor],
        options: Options,
        asked: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        walk = _ring if mesh.ring else _rectangle
        kept = walk.inputs_of(inputs, mesh, sizes, begun)
        rows, cols = walk.statistics(impl, kept, options, mesh, sizes)
        whole = Whole(sum(sizes.images), sum(sizes.texts))
        means = _counted(rows, cols, options, mesh, whole)
        terms, diagnostics = _result(rows, cols, inputs, options, mesh, whole, means)
        ctx.mark_non_differentiable(diagnostics)
        if not asked:  # nobody will need the final statistics, so they need not travel
            return terms, diagnostics
        finals = _statistics.finals(rows, cols, options, len(inputs.text))
        own = Saved(*(stats.to(terms.dtype) for stats in finals))
        weights = None if options.halved else _statistics.side_weights(options, *means, own.row_stats)
        ctx.save_for_backward(*kept, *walk.saved_of(own, mesh, sizes), weights)
        ctx.call = impl, mesh, sizes, options, whole
        return terms, diagnostics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_terms: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        impl, mesh, sizes, options, whole = ctx.call
        tensors, fields = ctx.saved_tensors, len(Inputs._fields)
        inputs, saved, weights = Inputs(*tensors[:fields]), Saved(*tensors[fields:-1]), tensors[-1]
        asked = dict(zip(Inputs._fields, ctx.needs_input_grad[6:], strict=True))
        needs = Needs(*(asked[name] for name in Needs._fields))
        walk = _ring if mesh.ring else _rectangle
        own = walk.gradients(impl, grad_terms, inputs, saved, options, needs, mesh, sizes, whole, weights)
        dtype = inputs.image.dtype
        by_name = {"image": own.image, "text": own.text}
        by_name = {name: None if x is None else x.mul_(mesh.size).to(dtype) for name, x in by_name.items()}
        if own.logit_scale is not None:  # every rank learns the whole of it
            parts = gather(own.logit_scale[None], [1] * mesh.size, mesh.everyone)
            by_name["logit_scale"] = parts.sum(0)
        return None, None, None, None, None, None, *(by_name.get(name) for name in Inputs._fields)


def _counted(rows: Side, cols: Side, options: Options, mesh: Mesh, whole: Whole) -> Counted:
    """Return over how many rows and columns of all ranks the means run."""
    if not options.ignore:
        return Counted(*whole)
    own = [
        _statistics.counted(side, options) if side else 0 * rows["positives"].sum() for side in (rows, cols)
    ]
    numbers = torch.stack([x.double() for x in own if isinstance(x, Tensor)])
    return Counted(*gather(numbers[None], [1] * mesh.size, mesh.everyone).sum(0).unbind())


def _result(
    rows: Side, cols: Side, inputs: Inputs, options: Options, mesh: Mesh, whole: Whole, means: Counted
) -> tuple[Tensor, Tensor]:
    """Return terms and diagnostics: what this rank's rows and columns add to each, summed over the ranks."""
    shift = inputs.logit_scale.double() * (options.margin / _statistics.LN2)
    shares = _statistics.shares(rows, cols, shift, options, whole, means)
    terms, diagnostics = (
        gather(share[None], [1] * mesh.size, mesh.everyone).sum(0) if len(share) else share
        for share in shares
    )
    dtype = accumulation_dtype(inputs.image)
    return terms.to(dtype), diagnostics.to(dtype)


# ---------------------------------------------------------------------------------------------------
# The definition: every rank computes the whole matrix, so every rank has the whole gradient.


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, sizes: Sequence[int]) -> Tensor:
        ctx.mesh, ctx.first, ctx.length = mesh, sum(sizes[: mesh.rank]), len(x)
        return arrived(gather(x, sizes, mesh.everyone))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.mesh.size * grad[ctx.first : ctx.first + ctx.length], None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.ranks = mesh.size
        return gather(x[None], [1] * mesh.size, mesh.everyone).sum(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ranks * grad, None


def _gathered_with_gradient(inputs: Inputs, mesh: Mesh, sizes: Sizes) -> Inputs:
    def everyones(x: Any, of: Sequence[int]) -> Any:
        return None if x is None else _GatherWithGradient.apply(x, mesh, of)

    return Inputs(
        image=everyones(inputs.image, sizes.images),
        text=everyones(inputs.text, sizes.texts),
        logit_scale=inputs.logit_scale,
        teacher_image=everyones(inputs.teacher_image, sizes.images),
        teacher_text=everyones(inputs.teacher_text, sizes.texts),
        teacher_logit_scale=inputs.teacher_logit_scale,
        labels=everyones(inputs.labels, sizes.images),
        text_labels=everyones(inputs.text_labels, sizes.texts),
    )
