"""The walk of a ring of ranks: each keeps its images, and the texts of all ranks pass by.

A block, the texts of one rank with what belongs to them, visits every rank once and comes home. The next block is
under way while the present one is computed on, so a rank holds two, and O(N/R·D) numbers in all. What the ranks
add up about a block, its statistics and then its gradients, follows it one step behind.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tracer._agreement import Sizes
from tracer._autograd import rectangle_gradients, rectangle_statistics
from tracer._collectives import arrived, pass_on
from tracer._mesh import Mesh
from tracer._rectangle import positions, with_indices
from tracer.kernels import _statistics
from tracer.kernels._statistics import Side, Whole
from tracer.kernels.contrastive import Gradients, Inputs, Needs, Options, Saved, accumulation_dtype

Block = dict[str, Tensor]


def inputs_of(inputs: Inputs, mesh: Mesh, sizes: Sizes) -> Inputs:
    """Return this rank's inputs with labels; without any, a pair's label is its place in the global batch."""
    if inputs.labels is not None:
        return inputs
    own = positions(sizes.images, [mesh.rank], inputs.image.device)
    return inputs._replace(labels=own, text_labels=own)


def saved_of(saved: Saved, _: Mesh, __: Sizes) -> Saved:
    """Return the final statistics of this rank's rows and columns: each rank keeps its own alone."""
    return saved


def statistics(impl: str, inputs: Inputs, options: Options, mesh: Mesh, sizes: Sizes) -> tuple[Side, Side]:
    """Return the statistics of this rank's rows and columns over all logits."""
    names = _statistics.statistic_names(options, inputs.has_teacher)
    device = inputs.image.device
    rows: Tensor | None = None
    cols: Tensor | None = None
    for owner, block in passing(columns(inputs), mesh, sizes):
        row_part, col_part = rectangle_statistics(impl, inputs._replace(**block), options)
        if options.stats:  # indices of the rectangle become those of the global batch
            row_part = with_indices(row_part, names, positions(sizes.texts, [owner], device))
            col_part = with_indices(col_part, names, positions(sizes.images, [mesh.rank], device))
        rows = _merged(rows, row_part, names)
        if options.one_way:
            continue
        follows = sizes.texts[(owner + 1) % mesh.size]
        cols = pass_on(_merged(cols, col_part, names), follows, mesh)
    assert rows is not None  # a ring has at least one block
    return _statistics.unpack(rows, names), {} if cols is None else _statistics.unpack(arrived(cols), names)


def gradients(
    impl: str,
    grad_terms: Tensor,
    inputs: Inputs,
    saved: Saved,
    options: Options,
    needs: Needs,
    mesh: Mesh,
    sizes: Sizes,
    whole: Whole,
    weights: Tensor | None,
) -> Gradients:
    """Return the gradients of this rank's features, and its part of that of logit_scale."""
    dtype = accumulation_dtype(inputs.image)
    image: Tensor | None = None
    text: Tensor | None = None
    scale: Tensor | None = None
    travelling = columns(inputs)
    if len(saved.col_stats):  # else nothing is asked of the columns
        travelling["col_stats"] = saved.col_stats.T
    for owner, block in passing(travelling, mesh, sizes):
        final = saved
        if "col_stats" in block:
            final = saved._replace(col_stats=block.pop("col_stats").T.contiguous())
        rectangle = inputs._replace(**block)
        part = rectangle_gradients(impl, grad_terms, rectangle, final, options, needs, whole, weights)
        image, scale = _added(image, part.image, dtype), _added(scale, part.logit_scale, dtype)
        if part.text is not None:
            total = _added(part.text.to(dtype), None if text is None else arrived(text), dtype)
            assert total is not None
            text = pass_on(total, sizes.texts[(owner + 1) % mesh.size], mesh)
    return Gradients(image, None if text is None else arrived(text), scale)


def _added(total: Tensor | None, part: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Add ``part`` to ``total`` in place, which takes no further memory; None stands for nothing yet."""
    if part is None or total is None:
        return total if part is None else part.to(dtype)
    return total.add_(part)


def columns(inputs: Inputs) -> Block:
    """Return what travels: the texts and what belongs to them."""
    names = ("text", "teacher_text", "text_labels")
    block = {name: getattr(inputs, name) for name in names}
    return {name: x for name, x in block.items() if x is not None}


def passing(block: Block, mesh: Mesh, sizes: Sizes) -> Iterator[tuple[int, Block]]:
    """Yield the owner and the content of each block that passes by, this rank's own first."""
    for step in range(mesh.size):
        owner = (mesh.rank + step) % mesh.size
        follows: Block = {}
        if step + 1 < mesh.size:
            receive = sizes.texts[(owner + 1) % mesh.size]
            follows = {name: pass_on(x, receive, mesh) for name, x in block.items()}
        yield owner, dict(block)
        block = {name: arrived(x) for name, x in follows.items()}


def _merged(before: Tensor | None, part: Tensor, names: tuple[str, ...]) -> Tensor:
    """Return the packed statistics of both, in float64; ``before`` is None where nothing was seen before."""
    part = _statistics.pack(_statistics.unpack(part, names), names, torch.float64)
    if before is None:
        return part
    both = torch.stack([arrived(before), part])
    return _statistics.pack(_statistics.merge(_statistics.unpack(both, names)), names, torch.float64)
