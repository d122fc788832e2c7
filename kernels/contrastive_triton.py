"""Launchers of the Triton kernels of the contrastive, margin and distillation terms.

``contrastive_eager`` defines what is computed. Here no N×M matrix ever reaches memory, except a strip of
gradient rows of bounded size in the backward pass.

**One walk.** A two-dimensional grid of programs cuts the logit matrix into rectangles; each program
walks its rectangle tile by tile. The four logit tiles of a visit are one 2×2 product of the four
operand tiles, ``[u; u']·[v; v']ᵀ = [s a; b t]``, and a switched-off term drops its products at compile
time: CLIP and MPM-NCE need one product, the full objective four.

**Forward.** :func:`walk` leaves the partial statistics of every rectangle, and :func:`combine` merges them into
log-sum-exps and terms (``_triton_forward``).

**Backward.** The gradients of the logits of a strip of rows come from one launch (``_triton_backward``), and the
vendor's matrix product finishes

    ∂L/∂u = σ (∂s V + ∂a V')        ∂L/∂v = σ (∂sᵀ U + ∂bᵀ U')        accumulated in float32.

Per pair of statistics the formulas are, along a row i (columns: a → b, and likewise)

    CE(q, z)    = lse z − (1−ε)/|P| Σ_P z − ε/(M−|P|) Σ_¬P z
    KL(t ‖ s)   = Σ_j eᵗ (t − s) / Σ_j eᵗ − lse t + lse s
    CE(P/|P|, a) = lse a − Σ_P a / |P|

and their derivatives are softmax minus target.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _tiles
from ._grid import Grid, plan, strips
from ._statistics import SOFTMAX, Side, Whole, asks_for_targets, leave_out, weights_of, without_targets
from ._tiles import Tile
from ._triton import gpu, launch, require_gpu, triton
from ._triton_backward import backward_kernel
from ._triton_forward import combine_kernel, forward_kernel, merge_kernel
from ._triton_tile import PARTIAL_NAMES, POSITIVES, S_MAX, T_MAX, Z_MAX, slots_of
from .contrastive import (
    TERMS,
    Forward,
    Gradients,
    Inputs,
    Needs,
    Options,
    Saved,
    Statistics,
    diagnostic_names,
    teacher_factor,
)


def _operands(inputs: Inputs, options: Options) -> Inputs:
    """Return the inputs as the kernels read them: contiguous, scales in float32, the teacher's divided by T."""
    require_gpu(inputs.image, instead="blocked")
    dtype, factor = inputs.image.dtype, teacher_factor(inputs, options)
    return Inputs(
        image=inputs.image.contiguous(),
        text=inputs.text.contiguous(),
        logit_scale=inputs.logit_scale.to(torch.float32),
        teacher_image=None if inputs.teacher_image is None else inputs.teacher_image.to(dtype).contiguous(),
        teacher_text=None if inputs.teacher_text is None else inputs.teacher_text.to(dtype).contiguous(),
        teacher_logit_scale=None if factor is None else factor.to(torch.float32),
        labels=None if inputs.labels is None else inputs.labels.contiguous(),
        text_labels=None if inputs.text_labels is None else inputs.text_labels.contiguous(),
    )


def _terms(options: Options) -> dict[str, bool]:
    """Return the kernels' compile-time switches of the terms: CONTRASTIVE, RELATIONAL, …"""
    return {name.upper(): getattr(options, name) for name in TERMS}


def _launch(
    kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], tile: Tile, **constants: Any
) -> None:
    launch(kernel, grid, arguments, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages)


# --------------------------------------------------------------------------------------------------
# Forward
# --------------------------------------------------------------------------------------------------


class Partials(NamedTuple):
    """Partial statistics of the rectangles of a grid: K active ones, ``slots`` says which and where."""

    rows: Tensor  # [grid columns, tiles along rows, K, block_n]
    cols: Tensor  # [grid rows, tiles along columns, K, block_m]
    parked: Tensor  # like cols: those of a row of tiles, until the walk merges them into cols
    slots: tuple[int, ...]
    grid: Grid

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time constants of the kernels that read or write them."""
        tile = self.grid.tile
        return {
            "K": self.rows.shape[2],
            "SLOTS": self.slots,
            "BLOCK_N": tile.block_n,
            "BLOCK_M": tile.block_m,
        }


def _scratch(inputs: Inputs, options: Options, tile: Tile) -> Partials:
    """Return uninitialised memory for the partial statistics of a walk."""
    image, slots = inputs.image, slots_of(inputs, options)
    grid, K = plan(len(image), len(inputs.text), tile, gpu(image.device).multiprocessors), max(slots) + 1
    rows = image.new_empty((grid.programs[1], grid.tiles[0], K, tile.block_n), dtype=torch.float32)
    cols = image.new_empty((grid.programs[0], grid.tiles[1], K, tile.block_m), dtype=torch.float32)
    parked = torch.empty_like(cols) if grid.rectangle[0] > 1 else cols
    return Partials(rows, cols, parked, slots, grid)


def walk(operands: Inputs, options: Options, partials: Partials) -> None:
    """Walk over the logits once and write the partial statistics of every rectangle."""
    N, M, D = len(operands.image), len(operands.text), operands.image.shape[1]
    grid, slots = partials.grid, partials.slots
    _launch(
        forward_kernel, grid.programs,
        (*operands, partials.rows, partials.cols, partials.parked,
         float(options.margin), N, M, D, grid.rows, grid.cols),
        grid.tile, **partials.constants, D=D, LABELS=operands.labels is not None, MARGIN=options.margin != 0,
        ONE_WAY=options.one_way, USE_S=slots[Z_MAX] >= 0 or slots[S_MAX] >= 0, USE_X=options.crossed,
        USE_T=slots[T_MAX] >= 0, PRECISION=_tiles.precision(operands.image),
        BLOCK_D=grid.tile.block_d, MERGE=_tiles.MERGE,
    )  # fmt: skip


def combine(operands: Inputs, options: Options, partials: Partials) -> Forward:
    """Merge the partial statistics of all rectangles into final statistics, terms and diagnostics."""
    image, N, M = operands.image, len(operands.image), len(operands.text)
    tile, programs = _tiles.COMBINE, partials.grid.programs
    width = len(TERMS) + (len(diagnostic_names(operands.has_teacher)) if options.stats else 0)
    heights = len(Statistics._fields), 0 if options.one_way else len(Statistics._fields)
    saved = Saved(
        *(image.new_empty((k, n), dtype=torch.float32) for k, n in zip(heights, (N, M), strict=True))
    )
    grid = (triton.cdiv(N if options.one_way else max(N, M), tile.block_n), 1 if options.one_way else 2)
    sums = image.new_zeros((grid[1] * grid[0], width), dtype=torch.float32)
    _launch(
        combine_kernel, grid,
        (partials.rows, partials.cols, operands.labels, operands.text_labels, operands.logit_scale, *saved, sums,
         float(options.margin), float(options.smoothing), N, M, programs[1], programs[0]),
        tile, **partials.constants, **_terms(options), WIDTH=width, LABELS=operands.labels is not None,
        SMOOTHING=options.smoothing != 0, STATS=options.stats, IGNORE=options.ignore, BLOCK=tile.block_n,
    )  # fmt: skip
    for weight, stats in zip((options.image_to_text, options.text_to_image), saved, strict=True):
        if len(stats) and not options.ignore and not asks_for_targets(options, weight):
            without_targets(stats)
    if not options.halved:
        sums = _reweighted(sums.view(grid[1], grid[0], width).sum(1), saved, options, Whole(N, M))
    terms, diagnostics = sums.sum(0).split([len(TERMS), width - len(TERMS)])
    return Forward(terms.clone(), *saved, diagnostics.clone())


def _reweighted(sums: Tensor, saved: Saved, options: Options, whole: Whole) -> Tensor:
    """Return the rows' and columns' shares of the outputs with the weights and the means that the options ask for.

    Also marks the rows and columns that are left out of the means.
    """
    if options.ignore:
        for stats in saved:
            if len(stats):
                leave_out(stats)
    weights = weights_of(saved, options, whole)
    assert weights is not None
    of_terms = 2 * weights[:, None] * torch.stack([torch.full_like(weights[0], n) for n in whole])[:, None]
    terms = (of_terms[: len(sums)] * sums[:, : len(TERMS)]).masked_fill(of_terms[: len(sums)] == 0, 0.0)
    if not options.stats:
        return terms
    numbers = [
        (stats[POSITIVES.value] >= 0).sum() if options.ignore else n
        for stats, n in zip(saved, whole, strict=True)
    ]
    lengths = torch.stack(
        [weights[0].new_ones(()) * n / number for n, number in zip(whole, numbers, strict=True)]
    )
    return torch.cat([terms, lengths[:, None] * sums[:, len(TERMS) :]], 1)


@torch.no_grad()
def forward(inputs: Inputs, options: Options, *, tile: Tile | None = None) -> Forward:
    """Return terms, statistics and diagnostics, all float32.

    Args:
        inputs: float32, bfloat16 or float16 features on a GPU, D a multiple of 8.
        options: what to compute.
        tile: overrides the table of ``_tiles``.

    Raises:
        ValueError: the tensors are not on a GPU.
    """
    operands = _operands(inputs, options)
    tile = _forward_tile(inputs, options) if tile is None else tile
    partials = _scratch(inputs, options, tile)
    walk(operands, options, partials)
    return combine(operands, options, partials)


def _form(kernel: str, products: int, inputs: Inputs, options: Options) -> str:
    """Return the name of a walk's tiles in the table."""
    if options.one_way:
        return f"{kernel}, one way"
    plain = products == 1 and inputs.labels is None and not (options.margin or options.smoothing)
    return f"{kernel}, plain" if plain else kernel


def _forward_tile(inputs: Inputs, options: Options) -> Tile:
    slots = slots_of(inputs, options)
    crossed = options.crossed * (1 if options.one_way else 2)
    products = (slots[Z_MAX] >= 0 or slots[S_MAX] >= 0) + (slots[T_MAX] >= 0) + crossed
    kernel = "forward with stats" if options.stats else _form("forward", products, inputs, options)
    return _tiles.choose(
        kernel, products, inputs.image, len(inputs.text), lambda tile: forward(inputs, options, tile=tile)
    )


@torch.no_grad()
def statistics(inputs: Inputs, options: Options, *, tile: Tile | None = None) -> tuple[Side, Side]:
    """Return the statistics of the rows and of the columns of a rectangle; see ``_statistics``.

    Arguments and errors are those of :func:`forward`.
    """
    operands = _operands(inputs, options)
    partials = _scratch(inputs, options, _forward_tile(inputs, options) if tile is None else tile)
    walk(operands, options, partials)
    rows = _side(_merged(partials.rows, partials, len(operands.image)), partials.slots)
    if options.one_way:
        return rows, {}
    cols = _side(_merged(partials.cols, partials, len(operands.text)), partials.slots)
    for matrix in ("s", "t"):
        if f"arg_{matrix}" in rows:
            rows[f"right_{matrix}"] = _right(operands.labels, operands.text_labels, rows[f"arg_{matrix}"])
            cols[f"right_{matrix}"] = _right(operands.text_labels, operands.labels, cols[f"arg_{matrix}"])
    return rows, cols


def _merged(scratch: Tensor, partials: Partials, length: int) -> Tensor:
    """Return the partial statistics [K, length] of rows (or columns) merged over all programs."""
    merged = scratch.new_empty((scratch.shape[2], length))
    tile = _tiles.COMBINE
    _launch(
        merge_kernel, (triton.cdiv(length, tile.block_n), 1), (scratch, merged, length, len(scratch)), tile,
        K=scratch.shape[2], SLOTS=partials.slots, PART=scratch.shape[3], BLOCK=tile.block_n,
    )  # fmt: skip
    return merged


def _side(merged: Tensor, slots: tuple[int, ...]) -> Side:
    """Return the statistics that partial statistics make, which are relative to a maximum."""
    raw = {name: merged[slot] for name, slot in zip(PARTIAL_NAMES, slots, strict=True) if slot >= 0}
    side: Side = {"positives": raw.get("positives", torch.ones_like(merged[0]))}
    side |= {name: x for name, x in raw.items() if name.startswith("positive_")}
    for matrix in ("s", "t"):
        if f"arg_{matrix}" in raw:
            side[f"best_{matrix}"] = raw[f"max_{matrix}"]
            side[f"arg_{matrix}"] = raw[f"arg_{matrix}"].view(torch.int32).long()
    for matrix in ("z", "s", "t", "x"):
        if f"max_{matrix}" in raw:
            side[f"lse_{matrix}"] = raw[f"max_{matrix}"] + raw[f"sum_{matrix}"].log2()
    if "lse_z" in side:  # without a margin s is z, and with one nothing else needs the sums of s
        side.setdefault("lse_s", side["lse_z"])
    if "negative_s" in raw:
        side["total_s"] = raw["negative_s"] + raw["positive_s"]
    for name, matrix in SOFTMAX.items():
        if name in raw:
            side[name] = raw[name] / raw[f"sum_{matrix}" if f"sum_{matrix}" in raw else "sum_z"]
    return side


def _right(own: Tensor | None, other: Tensor | None, arg: Tensor) -> Tensor:
    """Return 1 for each row (or column) whose largest logit, at index ``arg``, is a positive, else 0."""
    if own is None or other is None:
        return arg == torch.arange(len(arg), device=arg.device)
    return other[arg.clamp(max=len(other) - 1)] == own  # rows of NaN have no largest logit


# --------------------------------------------------------------------------------------------------
# Backward
# --------------------------------------------------------------------------------------------------


class _Matrices(NamedTuple):
    """Which logit matrices a backward pass recomputes, and of which it stores the gradients."""

    s: bool
    a: bool
    b: bool
    t: bool
    store_s: bool
    store_a: bool
    store_b: bool

    @classmethod
    def of(cls, options: Options, needs: Needs) -> _Matrices:
        s = options.contrastive or options.relational
        a = options.crossed and (needs.image or needs.logit_scale)
        b = options.crossed and not options.one_way and (needs.text or needs.logit_scale)
        t = options.relational or (options.cross and (a or b))
        return cls(s, a, b, t, s and (needs.image or needs.text), a and needs.image, b and needs.text)

    @property
    def products(self) -> int:
        return self.s + self.a + self.b + self.t

    @property
    def stored(self) -> int:
        return self.store_s + self.store_a + self.store_b


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` in float32, added to ``total`` in place; ``left`` and ``right`` in any one dtype."""
    if left.dtype == torch.float32:
        return left @ right if total is None else total.addmm_(left, right)
    if left.is_cuda and torch.version.hip is None:
        if total is None:
            return torch.mm(left, right, out_dtype=torch.float32)
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    if left.is_cuda:  # no float32 output there: one rounding per strip, the sum over strips in float32
        product = (left @ right).float()
    else:  # the interpreter's CPU tensors
        product = left.float() @ right.float()
    return product if total is None else total.add_(product)


@torch.no_grad()
def backward(
    grad_terms: Tensor,
    inputs: Inputs,
    saved: Saved,
    options: Options,
    needs: Needs,
    whole: Whole | None = None,
    weights: Tensor | None = None,
    *,
    tile: Tile | None = None,
    strip_bytes: int | None = None,
) -> Gradients:
    """Return the gradients of ``dot(grad_terms, terms)``.

    Args:
        grad_terms: [len(TERMS)], on the device; nothing here waits for its values.
        inputs, options: as in :func:`forward`.
        saved: final statistics of the whole rows and columns.
        needs: which gradients to compute.
        whole: size of the matrix of which the inputs are a rectangle; by default they are all of it.
        weights: [2], what a row and a column of that matrix weigh in a term; by default what ``saved`` says.
        tile: overrides the table of ``_tiles``.
        strip_bytes: bound on the scratch for gradient strips; see ``_grid.strips``.
    """
    if not any(needs):
        return Gradients(None, None, None)
    use = _Matrices.of(options, needs)
    if tile is None:
        tile = _tiles.choose(
            _form("backward", use.products, inputs, options), use.products, inputs.image, len(inputs.text),
            lambda tile: backward(
                grad_terms, inputs, saved, options, needs, whole, weights, tile=tile, strip_bytes=strip_bytes
            ),
        )  # fmt: skip
    operands = _operands(inputs, options)
    image, text, scale = operands.image, operands.text, operands.logit_scale
    N, M, D = len(image), len(text), image.shape[1]
    whole = Whole(N, M) if whole is None else whole
    weights = weights_of(saved, options, whole) if weights is None else weights

    # The kernel reads rows without strides; an upstream gradient may be a broadcast number.
    grad_terms = grad_terms.to(torch.float32).contiguous()
    saved = Saved(*(x.contiguous() for x in saved))

    # 1. Strips: as many rows at a time as the bound allows, in whole tiles.
    cut = strips(N, M, D, tile, use.stored, image.element_size(), strip_bytes)
    ds, da, db = (
        image.new_empty((cut.height, cut.stride)) if store else None
        for store in (use.store_s, use.store_a, use.store_b)
    )
    multiprocessors = gpu(image.device).multiprocessors
    grid = plan(cut.height, M, tile, multiprocessors)
    d_scales: Tensor | None = None
    if needs.logit_scale:
        d_scales = image.new_zeros(
            (len(cut.starts), grid.programs[0] * grid.programs[1]), dtype=torch.float32
        )

    # The kernel works relative to the largest upstream gradient and to the smaller side.
    gain = grad_terms.abs().amax()
    if weights is None:
        gain = gain / (2 * min(whole))
    else:
        largest = weights.to(torch.float32).amax()
        gain, weights = gain * largest, weights.to(torch.float32) / largest
    d_image = torch.empty_like(image) if needs.image else None
    d_text: Tensor | None = None
    for i, first in enumerate(cut.starts):
        last = min(first + cut.height, N)
        _launch(
            backward_kernel, (triton.cdiv(last - first, grid.rows), grid.programs[1]),
            (grad_terms, *operands, *saved, ds, da, db, cut.stride, None if d_scales is None else d_scales[i],
             weights, float(options.margin), float(options.smoothing), N, M, D, *whole, first, last, grid.rows,
             grid.cols),
            tile, **_terms(options), D=D, LABELS=operands.labels is not None, MARGIN=options.margin != 0,
            SMOOTHING=options.smoothing != 0, USE_S=use.s, USE_A=use.a, USE_B=use.b, USE_T=use.t,
            ONE_WAY=options.one_way, D_LOGIT_SCALE=needs.logit_scale, PRECISION=_tiles.precision(image),
            BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, BLOCK_D=tile.block_d,
        )  # fmt: skip

        # 2. ∂L/∂u of these rows is complete; ∂L/∂v sums over strips.
        rows = slice(first, last)
        filled = slice(0, last - first), slice(0, M)
        if d_image is not None:
            total: Tensor | None = None
            for strip, right in ((ds, text), (da, operands.teacher_text)):
                if strip is not None and right is not None:
                    total = _add_product(total, strip[filled], right)
            if total is None:  # no term is enabled
                d_image.zero_()
            else:
                torch.mul(total, gain * scale, out=d_image[rows])
        if needs.text:
            for strip, right in ((ds, image), (db, operands.teacher_image)):
                if strip is not None and right is not None:
                    d_text = _add_product(d_text, strip[filled].T, right[rows])
    ds = da = db = strip = None  # freed before the last copy, at which most would be in memory
    if needs.text:
        d_text = torch.zeros_like(text) if d_text is None else d_text.mul_(gain * scale).to(text.dtype)
    return Gradients(d_image, d_text, None if d_scales is None else d_scales.sum() * gain)
