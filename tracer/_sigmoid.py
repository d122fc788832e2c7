"""The sigmoid form inside torch: its gradients, its custom operator, and its walk over the ranks of a mesh.

One walk yields the sums over pairs and, where they are the contrastive term's alone, its gradients: the backward
pass multiplies them by the upstream gradient and needs nothing else. With the relational term, two upstream
gradients meet in one walk, so that the backward pass walks once more.

Over ranks, each walks over its rectangle, the sums are added up, and gradients go to the ranks that own the
features. There are no statistics, so that a ring carries texts and their gradients alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracer import _autograd, _rectangle, _ring
from tracer._agreement import Sizes
from tracer._collectives import arrived, gather, pass_on
from tracer._mesh import Mesh
from tracer.kernels.contrastive import TERMS, Biases, Inputs, Options, accumulation_dtype
from tracer.kernels.sigmoid import PairNeeds, Pairs, divisor, rows_with_positives

_TENSORS = (*Inputs._fields, *Biases._fields)


class Ranks(NamedTuple):
    """The mesh of a call over several ranks, the sizes of their batches, and the gathers that began before."""

    mesh: Mesh
    sizes: Sizes
    begun: Mapping[str, Tensor]

    def transposed(self) -> Ranks:
        """Return the same with images and texts exchanged, whose gathers are yet to begin."""
        return self._replace(sizes=Sizes(self.sizes.texts, self.sizes.images), begun={})


def contrastive_terms(
    impl: str, inputs: Inputs, biases: Biases, options: Options, ranks: Ranks | None = None
) -> Tensor:
    """Return the vector of terms, differentiable once: contrastive and relational, the others 0."""
    tensors = (*inputs, *biases)
    asked = torch.is_grad_enabled()
    asked_of = {
        name: asked and x is not None and x.requires_grad for name, x in zip(_TENSORS, tensors, strict=True)
    }
    needs = PairNeeds(True, *(asked_of[name] for name in PairNeeds._fields[1:]))
    return _Terms.apply(impl, options, needs, ranks, *tensors)


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, impl: str, options: Options, needs: PairNeeds, ranks: Ranks | None, *tensors: Tensor | None
    ) -> Tensor:
        inputs, biases = _records(tensors)
        kept = inputs if ranks is None else _walk_of(ranks).inputs_of(inputs, *ranks)
        # Two terms may get different upstream gradients, which only the backward pass knows.
        formed = needs.gradients and not options.relational
        rows = _rows(inputs, options, ranks)
        if isinstance(rows, Tensor):
            rows = divisor(rows, accumulation_dtype(inputs.image))
        pairs = _walk(impl, kept, biases, options, needs if formed else PairNeeds(), None, ranks)
        ctx.save_for_backward(*(pairs[1:] if formed else (*kept, *biases)), *_tensor(rows))
        ranks = ranks and ranks._replace(begun={})  # they have arrived
        ctx.call = impl, options, needs, ranks, formed, rows if isinstance(rows, int) else None
        ctx.dtypes = inputs.image.dtype, inputs.text.dtype
        assert pairs.sums is not None
        return pairs.sums / rows

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        impl, options, needs, ranks, formed, rows = ctx.call
        saved = ctx.saved_tensors
        if rows is None:
            *saved, rows = saved
        upstream_sums = upstream[0] / rows
        if formed:
            factor = upstream_sums[TERMS.index("contrastive")]
            gradients = [None if x is None else factor * x for x in saved]
        else:
            inputs, biases = _records(saved)
            again = needs._replace(sums=False)
            gradients = list(_walk(impl, inputs, biases, options, again, upstream_sums, ranks)[1:])
        by_name = dict(zip(PairNeeds._fields[1:], gradients, strict=True))
        for name, dtype in zip(("image", "text"), ctx.dtypes, strict=True):
            x = by_name[name]
            if x is not None:  # engines divide by the number of ranks
                by_name[name] = (x if ranks is None else ranks.mesh.size * x).to(dtype)
        given = _autograd.Once.only([by_name.get(name) for name in _TENSORS])
        return None, None, None, None, *given


def _records(tensors: Any) -> tuple[Inputs, Biases]:
    fields = len(Inputs._fields)
    return Inputs(*tensors[:fields]), Biases(*tensors[fields : fields + len(Biases._fields)])


def _tensor(x: Tensor | int) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else ()


def _rows(inputs: Inputs, options: Options, ranks: Ranks | None) -> Tensor | int:
    """Return over how many rows of the whole matrix the means run."""
    if ranks is None:
        return rows_with_positives(inputs, options, inputs.text_labels)
    mesh, sizes, _ = ranks
    if not options.ignore or inputs.text_labels is None:
        return sum(sizes.images)
    everyones = arrived(gather(inputs.text_labels, sizes.texts, mesh.everyone))
    own = rows_with_positives(inputs, options, everyones)
    assert isinstance(own, Tensor)
    return gather(own[None], [1] * mesh.size, mesh.everyone).sum()


# ---------------------------------------------------------------------------------------------------
# The walk, on one process and over ranks.


def _walk_of(ranks: Ranks) -> Any:
    return _ring if ranks.mesh.ring else _rectangle


def _walk(
    impl: str,
    inputs: Inputs,
    biases: Biases,
    options: Options,
    needs: PairNeeds,
    upstream: Tensor | None,
    ranks: Ranks | None,
) -> Pairs:
    """Return the sums over all pairs, and the gradients of this rank's features and of the scalars, whole."""

    def pairs_of(rectangle: Inputs) -> Pairs:
        if not _autograd.is_traced((upstream, *rectangle, *biases)):
            with torch.no_grad():
                return _pairs(impl, rectangle, biases, options, needs, upstream)
        values = _operator(impl, upstream, *rectangle, *biases, *options, *needs)
        return Pairs(*(x if need else None for x, need in zip(values, needs, strict=True)))

    if ranks is None:
        return pairs_of(inputs)
    mesh, sizes, _ = ranks
    if mesh.ring:
        own = _around_the_ring(pairs_of, inputs, mesh, sizes)
    else:
        own = pairs_of(inputs)
        dtype = accumulation_dtype(inputs.image)
        parts = {"image": own.image, "text": own.text}
        own = own._replace(image=None, text=None)
        image, text = _rectangle.of_owners(parts, mesh, sizes, dtype)
        own = own._replace(image=image, text=text)
    summed = {
        name: arrived(gather(getattr(own, name)[None], [1] * mesh.size, mesh.everyone)).sum(0)
        for name in ("sums", "logit_scale", "logit_bias")
        if getattr(own, name) is not None
    }
    return own._replace(**summed)


def _around_the_ring(pairs_of: Any, inputs: Inputs, mesh: Mesh, sizes: Sizes) -> Pairs:
    """Return this rank's part of the sums and the gradients of its features; texts' gradients follow the texts."""
    total: dict[str, Tensor] = {}
    text: Tensor | None = None
    for owner, block in _ring.passing(_ring.columns(inputs), mesh, sizes):
        part = pairs_of(inputs._replace(**block))
        for name in ("sums", "image", "logit_scale", "logit_bias"):
            if (x := getattr(part, name)) is not None:
                total[name] = total[name] + x if name in total else x
        if part.text is not None:
            so_far = part.text if text is None else part.text + arrived(text)
            text = pass_on(so_far, sizes.texts[(owner + 1) % mesh.size], mesh)
    text = None if text is None else arrived(text)
    return Pairs(*(text if name == "text" else total.get(name) for name in Pairs._fields))


# ---------------------------------------------------------------------------------------------------
# The custom operator.


def _shapes(inputs: Inputs) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"sums": (len(TERMS),), "logit_scale": (), "logit_bias": ()}
    return shapes | {name: tuple(getattr(inputs, name).shape) for name in ("image", "text")}


def _pairs(
    impl: str, inputs: Inputs, biases: Biases, options: Options, needs: PairNeeds, upstream: Tensor | None
) -> Pairs:
    if len(inputs.image) and len(inputs.text):
        with _autograd.without_autocast(inputs.image.device.type):
            walk = _autograd.implementation(impl, "sigmoid").walk
            return walk(inputs, biases, options, needs, upstream)  # type: ignore[no-any-return]
    shapes, dtype = _shapes(inputs), accumulation_dtype(inputs.image)  # of a rank without a batch
    return Pairs(
        *(
            inputs.image.new_zeros(shapes[name], dtype=dtype) if need else None
            for name, need in needs._asdict().items()
        )
    )


def _run(impl: str, upstream: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, biases, options, needs = _autograd.records(arguments, Inputs, Biases, Options, PairNeeds)
    pairs = _pairs(impl, inputs, biases, options, needs, upstream)
    nothing = inputs.image.new_empty(0, dtype=accumulation_dtype(inputs.image))
    return tuple(nothing.clone() if x is None else x for x in pairs)


def _fake(impl: str, upstream: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, _, _, needs = _autograd.records(arguments, Inputs, Biases, Options, PairNeeds)
    shapes, dtype = _shapes(inputs), accumulation_dtype(inputs.image)
    return tuple(
        inputs.image.new_empty(shapes[name] if need else 0, dtype=dtype)
        for name, need in needs._asdict().items()
    )


_operator = torch.library.custom_op(
    "tracer::sigmoid_pairs",
    _run,
    mutates_args=(),
    schema=(
        f"(str impl, Tensor? upstream, {_autograd.schema(Inputs, Biases, Options, PairNeeds)}) -> "
        f"({', '.join(['Tensor'] * len(Pairs._fields))})"
    ),
)
_operator.register_fake(_fake)
