"""The walk of a mesh of ranks: each gathers the features of its rectangle and walks over its logits once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tracer._agreement import Sizes
from tracer._autograd import rectangle_gradients, rectangle_statistics
from tracer._collectives import arrived, gather, to_owners
from tracer._mesh import Mesh
from tracer.kernels import _statistics
from tracer.kernels._statistics import Side, Whole
from tracer.kernels.contrastive import Gradients, Inputs, Needs, Options, Saved, accumulation_dtype


def _of(sizes: Sequence[int], ranks: range) -> list[int]:
    return [sizes[rank] for rank in ranks]


def positions(sizes: Sequence[int], ranks: Sequence[int], device: torch.device) -> Tensor:
    """Return where the rows that ``ranks`` hold stand in the global batch."""
    first = [sum(sizes[:rank]) for rank in ranks]
    parts = [
        torch.arange(start, start + sizes[rank], device=device)
        for start, rank in zip(first, ranks, strict=True)
    ]
    return torch.cat(parts)


def inputs_of(inputs: Inputs, mesh: Mesh, sizes: Sizes) -> Inputs:
    """Return the features of the rank's mesh row and mesh column.

    Without labels, a pair's label is its place in the global batch.
    """
    n, m = _of(sizes.images, mesh.row_ranks), _of(sizes.texts, mesh.col_ranks)
    device = inputs.image.device

    def row(x: Tensor | None) -> Tensor | None:
        return None if x is None else gather(x, n, mesh.row)

    def col(x: Tensor | None) -> Tensor | None:
        return None if x is None else gather(x, m, mesh.col)

    gathered = {
        "image": row(inputs.image),
        "text": col(inputs.text),
        "teacher_image": row(inputs.teacher_image),
        "teacher_text": col(inputs.teacher_text),
        "labels": row(inputs.labels),
        "text_labels": col(inputs.text_labels),
    }
    if inputs.labels is None:
        gathered["labels"] = positions(sizes.images, mesh.row_ranks, device)
        gathered["text_labels"] = positions(sizes.texts, mesh.col_ranks, device)
    return inputs._replace(**{name: arrived(x) for name, x in gathered.items() if x is not None})


def statistics(impl: str, rectangle: Inputs, options: Options, mesh: Mesh, sizes: Sizes) -> tuple[Side, Side]:
    """Return the statistics of this rank's rows and columns over all logits, merged from the ranks' parts."""
    names = _statistics.statistic_names(options, rectangle.has_teacher)
    rows, cols = rectangle_statistics(impl, rectangle, options)
    if options.stats:  # indices of the rectangle become those of the global batch
        device = rectangle.image.device
        rows = with_indices(rows, names, positions(sizes.texts, mesh.col_ranks, device))
        cols = with_indices(cols, names, positions(sizes.images, mesh.row_ranks, device))
    n, m = _of(sizes.images, mesh.row_ranks), _of(sizes.texts, mesh.col_ranks)
    rows = to_owners(rows, n, mesh.rank % mesh.cols, mesh.row)
    if options.one_way:
        return _statistics.merge(_statistics.unpack(arrived(rows), names)), {}
    cols = to_owners(cols, m, mesh.rank // mesh.cols, mesh.col)
    return (
        _statistics.merge(_statistics.unpack(arrived(rows), names)),
        _statistics.merge(_statistics.unpack(arrived(cols), names)),
    )


def with_indices(packed: Tensor, names: tuple[str, ...], at: Tensor) -> Tensor:
    """Return packed statistics whose indices k have become ``at[k]``."""
    if not len(at):
        return packed
    side = _statistics.unpack(packed, names)
    for name in names:
        if name.startswith("arg"):
            side[name] = at[side[name].clamp(max=len(at) - 1)]
    return _statistics.pack(side, names, packed.dtype)


def saved_of(saved: Saved, mesh: Mesh, sizes: Sizes) -> Saved:
    """Return the final statistics of the rows and columns of the rank's rectangle."""
    rows = gather(saved.row_stats.T, _of(sizes.images, mesh.row_ranks), mesh.row)
    if not len(saved.col_stats):  # nothing is asked of the columns
        width = sum(_of(sizes.texts, mesh.col_ranks))
        return Saved(arrived(rows).T.contiguous(), saved.col_stats.new_empty(0, width))
    cols = gather(saved.col_stats.T, _of(sizes.texts, mesh.col_ranks), mesh.col)
    return Saved(arrived(rows).T.contiguous(), arrived(cols).T.contiguous())


def gradients(
    impl: str,
    grad_terms: Tensor,
    rectangle: Inputs,
    saved: Saved,
    options: Options,
    needs: Needs,
    mesh: Mesh,
    sizes: Sizes,
    whole: Whole,
    weights: Tensor | None,
) -> Gradients:
    """Return the gradients of this rank's features, added up over all ranks that have a part of them.

    That of logit_scale is this rank's part of it.
    """
    through = rectangle_gradients(impl, grad_terms, rectangle, saved, options, needs, whole, weights)
    parts, scale = {"image": through.image, "text": through.text}, through.logit_scale
    del through
    return Gradients(*of_owners(parts, mesh, sizes, accumulation_dtype(rectangle.image)), scale)


def of_owners(
    parts: dict[str, Tensor | None], mesh: Mesh, sizes: Sizes, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of this rank's features in ``dtype``, from those of all rectangles in rank order.

    ``parts`` are this rectangle's, by name. They are taken out, so that none is in memory after it was sent.
    """
    n, m = _of(sizes.images, mesh.row_ranks), _of(sizes.texts, mesh.col_ranks)
    image, text = parts.pop("image"), parts.pop("text")
    if text is not None:
        text = arrived(to_owners(text, m, mesh.rank // mesh.cols, mesh.col))
        text = _sum(text, dtype)
    if image is not None:
        image = arrived(to_owners(image, n, mesh.rank % mesh.cols, mesh.row))
        image = _sum(image, dtype)
    return image, text


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum [n, D] of what ranks sent [ranks, n, D], in rank order."""
    return parts[0].to(dtype) if len(parts) == 1 else parts.to(dtype).sum(0)
