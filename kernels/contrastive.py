"""Triton kernels of the contrastive, margin and distillation terms, forward and backward.

``kernels/eager.py`` defines what is computed. Here no N×M matrix ever reaches memory, except a strip of
gradient rows of bounded size in the backward pass.

**One walk.** A two-dimensional grid of programs cuts the logit matrix into rectangles; each program
walks its rectangle tile by tile. The four logit tiles of a visit are one 2×2 product of the four
operand tiles, ``[u; u']·[v; v']ᵀ = [s a; b t]``, and a switched-off term drops its products at compile
time: CLIP and MPM-NCE need one product, the full objective four.

**Forward.** A tile is summarised along rows and along columns into *partial statistics*: running
maxima, sums of exponentials, and sums weighted by them. Partial statistics of disjoint sets of logits
merge exactly (``_merge``), so row statistics stay in registers, column statistics go to a part of the
scratch that only this program touches, and a small kernel merges the partials of all programs into
log-sum-exps and terms. No atomics: two runs agree bit for bit.

**Backward.** The same visit recomputes the tiles; with the saved log-sum-exps every probability is one
exponential, so ∂L/∂s, ∂L/∂a, ∂L/∂b form in registers. They are written, in the inputs' dtype, to a strip
of rows, and the vendor's matrix product finishes

    ∂L/∂u = σ (∂s V + ∂a V')        ∂L/∂v = σ (∂sᵀ U + ∂bᵀ U')        accumulated in float32.

Logits live in base 2 (scaled by log₂e) so that every exponential is a bare ``exp2``.

Per pair of statistics the formulas are, along a row i (columns: a → b, and likewise)

    CE(q, z)    = lse z − (1−ε)/|P| Σ_P z − ε/(M−|P|) Σ_¬P z
    KL(t ‖ s)   = Σ_j eᵗ (t − s) / Σ_j eᵗ − lse t + lse s
    CE(P/|P|, a) = lse a − Σ_P a / |P|

and their derivatives are softmax minus target.
"""

# mypy: disable-error-code="assignment"
# (kernels rebind names to tuples of other lengths, as Triton's language lets them)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _config
from ._config import Tile
from ._triton import device_guard, require_device, tl, triton
from .eager import STAT_ROWS

# --------------------------------------------------------------------------------------------------
# Partial statistics
# --------------------------------------------------------------------------------------------------

# The statistics of a row (or column), in the order in which a state tuple holds them. z: contrastive
# logits; s: student; t: teacher; x: the cross logits, a along rows and b along columns; eˢ: 2^(s − max s).
# fmt: off
(
    Z_MAX, Z_SUM, Z_POSITIVE, Z_NEGATIVE,  # max z, Σ eᶻ, Σ_P s, Σ_¬P s (only with smoothing)
    S_MAX, S_SUM,  # max s, Σ eˢ
    S_SELF, S_HIT, S_ARG,  # diagnostics: Σ eˢ s, Σ_P eˢ, the first argmax
    T_MAX, T_SUM, T_SELF, T_HIT, T_ARG,  # the same of the teacher
    T_MINUS_S, T_MINUS_X,  # Σ eᵗ (t − s), Σ eᵗ (t − x)
    X_MAX, X_SUM, X_POSITIVE,
    COUNT,  # |P|; without labels it is known to be 1
) = STATISTICS = tuple(tl.constexpr(i) for i in range(20))
# fmt: on
# How each merges: M maximum, S sum relative to the last maximum before it, I index of that maximum, P plain sum.
KINDS = tl.constexpr("MSPP MSSSI MSSSISS MSPP".replace(" ", ""))

# Rows of the saved statistics (STAT_ROWS): log-sum-exps (base 2) of z, s, t, x, and the number of positives.
LSE_Z, LSE_S, LSE_T = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LSE_X, POSITIVES = tl.constexpr(3), tl.constexpr(4)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The logit of a pair outside the matrix. Finite, so that differences of two of them are 0, not NaN.
OUTSIDE = tl.constexpr(-1.0e30)


@triton.jit
def _empty(FIRST: tl.constexpr, LAST: tl.constexpr, LENGTH: tl.constexpr):
    """Statistics FIRST to LAST of no logits at all: merging them changes nothing."""
    state = ()
    for i in tl.static_range(FIRST, LAST + 1):
        if KINDS[i] == "M":
            state += (tl.full([LENGTH], OUTSIDE, tl.float32),)
        else:
            state += (tl.zeros([LENGTH], tl.float32),)
    return state


@triton.jit
def _places(offs, K: tl.constexpr, BLOCK: tl.constexpr):
    """Where the scratch, laid out [blocks, K, BLOCK], holds the first statistic of rows or columns ``offs``.

    Statistic number i lies i · BLOCK further, a distance known at compile time: no register holds it.
    """
    return offs // BLOCK * (K * BLOCK) + offs % BLOCK


@triton.jit
def _load(ptr, places, inside, block, SLOTS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Statistics FIRST to LAST from the scratch; what is not inside is not read."""
    state = ()
    for i in tl.static_range(FIRST, LAST + 1):
        if SLOTS[i] >= 0:
            state += (tl.load(ptr + (places + SLOTS[i] * block), mask=inside, other=0.0),)
        else:
            state += (tl.zeros(places.shape, tl.float32),)
    return state


@triton.jit
def _store(ptr, places, inside, block, state, SLOTS: tl.constexpr, FIRST: tl.constexpr):
    """Store the statistics from FIRST on in the scratch."""
    for i in tl.static_range(len(state)):
        if SLOTS[FIRST + i] >= 0:
            tl.store(ptr + (places + SLOTS[FIRST + i] * block), state[i], mask=inside)


@triton.jit
def _merge(p, q, SLOTS: tl.constexpr, FIRST: tl.constexpr):
    """Statistics, from FIRST on, of the union of two disjoint sets of logits, p's before q's."""
    state = ()
    for i in tl.static_range(len(p)):
        if SLOTS[FIRST + i] < 0:
            state += (p[i],)
        elif KINDS[FIRST + i] == "M":
            top = tl.maximum(p[i], q[i])
            keep_p = tl.exp2(p[i] - top)
            keep_q = tl.exp2(q[i] - top)
            later = q[i] > p[i]  # a tie keeps the first index
            state += (top,)
        elif KINDS[FIRST + i] == "S":
            state += (p[i] * keep_p + q[i] * keep_q,)
        elif KINDS[FIRST + i] == "I":
            state += (tl.where(later, q[i], p[i]),)
        else:
            state += (p[i] + q[i],)
    return state


@triton.jit
def _softmax(b_x, AXIS: tl.constexpr):
    """Maximum, sum of exponentials, and the exponentials themselves of a tile along an axis."""
    top = tl.max(b_x, AXIS)
    b_e = tl.exp2(b_x - tl.expand_dims(top, AXIS))
    return top, tl.sum(b_e, AXIS), b_e


@triton.jit
def _first(b_x, top, offs, AXIS: tl.constexpr):
    """Index of the first entry that equals ``top``, as a float (exact up to 2^24)."""
    hit = b_x == tl.expand_dims(top, AXIS)
    return tl.min(tl.where(hit, tl.expand_dims(offs, 1 - AXIS), 0x7FFFFFFF), AXIS).to(tl.float32)


# What one tile contributes, one function per kind of logits, so that few tiles are alive at a time. The pads
# are 0 inside the matrix and OUTSIDE beyond; tiles are 0 beyond, so plain sums need no mask.


@triton.jit
def _contrastive_part(b_s, b_positive, shift, row_pad, col_pad, SLOTS: tl.constexpr, MARGIN: tl.constexpr):
    """Z_MAX … Z_NEGATIVE of the student's logits b_s; ``shift`` is the margin's share of z on negatives."""
    row_zero, col_zero = tl.zeros([b_s.shape[0]], tl.float32), tl.zeros([b_s.shape[1]], tl.float32)
    row_max, row_sum, row_hit, row_miss = row_zero, row_zero, row_zero, row_zero
    col_max, col_sum, col_hit, col_miss = col_zero, col_zero, col_zero, col_zero
    if SLOTS[Z_POSITIVE] >= 0:
        b_hit = tl.where(b_positive, b_s, 0.0)
        row_hit, col_hit = tl.sum(b_hit, 1), tl.sum(b_hit, 0)
    if SLOTS[Z_NEGATIVE] >= 0:
        b_miss = tl.where(b_positive, 0.0, b_s)
        row_miss, col_miss = tl.sum(b_miss, 1), tl.sum(b_miss, 0)
    if SLOTS[Z_MAX] >= 0:
        b_z = b_s
        if MARGIN:
            b_z = b_s + tl.where(b_positive, 0.0, shift)
        row_max, row_sum, _ = _softmax(b_z + col_pad, 1)
        col_max, col_sum, _ = _softmax(b_z + row_pad, 0)
    return (row_max, row_sum, row_hit, row_miss), (col_max, col_sum, col_hit, col_miss)


@triton.jit
def _own_part(b_x, b_positive, offs, pad, SLOTS: tl.constexpr, FIRST: tl.constexpr, AXIS: tl.constexpr):
    """S_MAX … S_ARG or T_MAX … T_ARG along an axis with indices ``offs``, and the exponentials."""
    zero = tl.zeros([b_x.shape[1 - AXIS]], tl.float32)
    top, total, weighed, hit, arg, b_e = zero, zero, zero, zero, zero, b_x
    if SLOTS[FIRST] >= 0:
        top, total, b_e = _softmax(b_x + pad, AXIS)
    if SLOTS[FIRST + 2] >= 0:
        weighed = tl.sum(b_e * b_x, AXIS)
        hit = tl.sum(tl.where(b_positive, b_e, 0.0), AXIS)
        arg = _first(b_x + pad, top, offs, AXIS)
    return (top, total, weighed, hit, arg), b_e


@triton.jit
def _teacher_part(b_t, b_s, b_x, b_positive, offs, pad, SLOTS: tl.constexpr, AXIS: tl.constexpr):
    """T_MAX … T_MINUS_X along an axis with indices ``offs``."""
    zero = tl.zeros([b_t.shape[1 - AXIS]], tl.float32)
    minus_s, minus_x = zero, zero
    own, b_e = _own_part(b_t, b_positive, offs, pad, SLOTS, T_MAX, AXIS)
    if SLOTS[T_MINUS_S] >= 0:
        minus_s = tl.sum(b_e * (b_t - b_s), AXIS)
    if SLOTS[T_MINUS_X] >= 0:
        minus_x = tl.sum(b_e * (b_t - b_x), AXIS)
    return own + (minus_s, minus_x)


@triton.jit
def _cross_part(b_x, b_positive, inside, pad, SLOTS: tl.constexpr, AXIS: tl.constexpr):
    """X_MAX … COUNT along an axis."""
    zero = tl.zeros([b_x.shape[1 - AXIS]], tl.float32)
    top, total, hit, count = zero, zero, zero, zero
    if SLOTS[COUNT] >= 0:
        ones = tl.expand_dims(tl.where(inside, 1.0, 0.0), 1 - AXIS)
        count = tl.sum(tl.where(b_positive, ones, 0.0), AXIS)
    if SLOTS[X_POSITIVE] >= 0:
        hit = tl.sum(tl.where(b_positive, b_x, 0.0), AXIS)
    if SLOTS[X_MAX] >= 0:
        top, total, _ = _softmax(b_x + pad, AXIS)
    return top, total, hit, count


# --------------------------------------------------------------------------------------------------
# The visit of one tile, shared by forward and backward
# --------------------------------------------------------------------------------------------------


@triton.jit
def _dots(
    image_ptr, text_ptr, teacher_image_ptr, teacher_text_ptr, row, col, N, M, width,
    D: tl.constexpr, USE_S: tl.constexpr, USE_A: tl.constexpr, USE_B: tl.constexpr, USE_T: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The tiles u·v, u·v', u'·v, u'·v' [BLOCK_N, BLOCK_M] at (row, col) in float32; 0 outside the matrix.

    ``width`` is D again, but not known to the compiler, which would else unroll the loop and spill.
    """
    b_s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    b_a = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    b_b = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    b_t = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # Scalar int64 (N·D passes 2^31 from a few million rows on), then small offsets within the tile.
    first_n, first_m = row * tl.full([], D, tl.int64), col * tl.full([], D, tl.int64)
    offs_n, offs_m = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_M)[None, :]
    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        row_mask, col_mask = row + offs_n < N, col + offs_m < M
        if D % BLOCK_D != 0:
            row_mask &= (offs_d < D)[None, :]
            col_mask &= (offs_d < D)[:, None]
        row_offs = offs_n * D + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
        col_offs = offs_m * D + offs_d[:, None]  # [BLOCK_D, BLOCK_M]
        if USE_S or USE_A:
            b_u = tl.load(image_ptr + first_n + row_offs, mask=row_mask, other=0.0)
        if USE_S or USE_B:
            b_v = tl.load(text_ptr + first_m + col_offs, mask=col_mask, other=0.0)
        if USE_B or USE_T:
            b_tu = tl.load(teacher_image_ptr + first_n + row_offs, mask=row_mask, other=0.0)
        if USE_A or USE_T:
            b_tv = tl.load(teacher_text_ptr + first_m + col_offs, mask=col_mask, other=0.0)
        if USE_S:
            b_s = tl.dot(b_u, b_v, b_s, input_precision=PRECISION)
        if USE_A:
            b_a = tl.dot(b_u, b_tv, b_a, input_precision=PRECISION)
        if USE_B:
            b_b = tl.dot(b_tu, b_v, b_b, input_precision=PRECISION)
        if USE_T:
            b_t = tl.dot(b_tu, b_tv, b_t, input_precision=PRECISION)
    return b_s, b_a, b_b, b_t


@triton.jit
def _positives(labels_ptr, text_labels_ptr, offs_n, offs_m, N, M, LABELS: tl.constexpr):
    """Which pairs of a tile are positives; outside the matrix the answer means nothing."""
    if LABELS:
        row_label = tl.load(labels_ptr + offs_n, mask=offs_n < N, other=0)  # [BLOCK_N]
        col_label = tl.load(text_labels_ptr + offs_m, mask=offs_m < M, other=0)  # [BLOCK_M]
        return row_label[:, None] == col_label[None, :]
    else:
        return offs_n[:, None] == offs_m[None, :]


# --------------------------------------------------------------------------------------------------
# Forward
# --------------------------------------------------------------------------------------------------


# Neither sizes nor the alignment of small operands select a compiled variant.
# fmt: off
_SCALARS = ["margin", "smoothing", "N", "M", "width", "first", "last", "rows", "cols", "row_groups", "col_groups"]
_SMALL = ["grad_terms_ptr", "scale_ptr", "teacher_scale_ptr", "labels_ptr", "text_labels_ptr", "d_scale_ptr"]
# fmt: on


@triton.jit(do_not_specialize=_SCALARS, do_not_specialize_on_alignment=_SMALL)
def _forward_kernel(
    image_ptr, text_ptr, scale_ptr,  # [N, D], [M, D], []
    teacher_image_ptr, teacher_text_ptr, teacher_scale_ptr,  # [N, D], [M, D], [], or None
    labels_ptr, text_labels_ptr,  # [N], [M], or None
    row_partial_ptr, col_partial_ptr, parked_ptr,  # [grid 1, blocks of rows, K, BLOCK_N], columns likewise, twice
    margin, N, M, width, rows, cols,  # rows, cols: size of a program's rectangle, in whole tiles
    K: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, LABELS: tl.constexpr, MARGIN: tl.constexpr,
    USE_S: tl.constexpr, USE_X: tl.constexpr, USE_T: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    # 1. The rectangle, and where its partial statistics go.
    first_row, first_col = tl.program_id(0) * rows, tl.program_id(1) * cols
    last_row, last_col = tl.minimum(first_row + rows, N), tl.minimum(first_col + cols, M)
    row_partial_ptr += tl.program_id(1).to(tl.int64) * tl.cdiv(N, BLOCK_N) * (K * BLOCK_N)
    col_partial_ptr += tl.program_id(0).to(tl.int64) * tl.cdiv(M, BLOCK_M) * (K * BLOCK_M)
    parked_ptr += tl.program_id(0).to(tl.int64) * tl.cdiv(M, BLOCK_M) * (K * BLOCK_M)

    # 2. Scales into base 2.
    scale = tl.load(scale_ptr) * LOG2E
    teacher_scale = scale
    if USE_T:
        teacher_scale = tl.load(teacher_scale_ptr) * LOG2E
    shift = margin * scale

    for row in range(first_row, last_row, BLOCK_N):
        offs_n = row + tl.arange(0, BLOCK_N)
        z, s = _empty(Z_MAX, Z_NEGATIVE, BLOCK_N), _empty(S_MAX, S_ARG, BLOCK_N)
        t, x = _empty(T_MAX, T_MINUS_X, BLOCK_N), _empty(X_MAX, COUNT, BLOCK_N)
        # The first row of tiles founds the column statistics, later ones park theirs to be merged.
        if row == first_row:
            park_ptr = col_partial_ptr
        else:
            park_ptr = parked_ptr

        for col in tl.range(first_col, last_col, BLOCK_M, disable_licm=True):
            offs_m = col + tl.arange(0, BLOCK_M)

            # 3. The dot products and the positives of a tile.
            b_s, b_a, b_b, b_t = _dots(
                image_ptr, text_ptr, teacher_image_ptr, teacher_text_ptr, row, col, N, M, width,
                D, USE_S, USE_X, USE_X, USE_T, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            b_positive = _positives(labels_ptr, text_labels_ptr, offs_n, offs_m, N, M, LABELS)

            b_s, b_a, b_b, b_t = b_s * scale, b_a * scale, b_b * scale, b_t * teacher_scale
            row_inside, col_inside = offs_n < N, offs_m < M
            row_pad = tl.where(row_inside, 0.0, OUTSIDE)[:, None]
            col_pad = tl.where(col_inside, 0.0, OUTSIDE)[None, :]

            # 4. Their statistics: those of rows merge into registers; those of columns, which are spread
            #    over all warps, go to this program's part of the scratch at once.
            places = _places(offs_m, K, BLOCK_M)
            row_part, col_part = _contrastive_part(b_s, b_positive, shift, row_pad, col_pad, SLOTS, MARGIN)
            _store(park_ptr, places, col_inside, BLOCK_M, col_part, SLOTS, Z_MAX)
            z = _merge(z, row_part, SLOTS, Z_MAX)

            col_part, _ = _own_part(b_s, b_positive, offs_n, row_pad, SLOTS, S_MAX, 0)
            _store(park_ptr, places, col_inside, BLOCK_M, col_part, SLOTS, S_MAX)
            row_part, _ = _own_part(b_s, b_positive, offs_m, col_pad, SLOTS, S_MAX, 1)
            s = _merge(s, row_part, SLOTS, S_MAX)

            col_part = _teacher_part(b_t, b_s, b_b, b_positive, offs_n, row_pad, SLOTS, 0)
            _store(park_ptr, places, col_inside, BLOCK_M, col_part, SLOTS, T_MAX)
            row_part = _teacher_part(b_t, b_s, b_a, b_positive, offs_m, col_pad, SLOTS, 1)
            t = _merge(t, row_part, SLOTS, T_MAX)

            col_part = _cross_part(b_b, b_positive, row_inside, row_pad, SLOTS, 0)
            _store(park_ptr, places, col_inside, BLOCK_M, col_part, SLOTS, X_MAX)
            row_part = _cross_part(b_a, b_positive, col_inside, col_pad, SLOTS, 1)
            x = _merge(x, row_part, SLOTS, X_MAX)

        # 5. Rows are complete.
        _store(row_partial_ptr, _places(offs_n, K, BLOCK_N), offs_n < N, BLOCK_N, z + s + t + x, SLOTS, Z_MAX)

        # 6. Merge what this row of tiles has parked, between barriers: other threads wrote it.
        if row > first_row:
            tl.debug_barrier()
            for col in range(first_col, last_col, MERGE):
                offs = col + tl.arange(0, MERGE)
                places, inside = _places(offs, K, BLOCK_M), offs < last_col
                seen = _load(col_partial_ptr, places, inside, BLOCK_M, SLOTS, Z_MAX, COUNT)
                new = _load(parked_ptr, places, inside, BLOCK_M, SLOTS, Z_MAX, COUNT)
                seen = _merge(seen, new, SLOTS, Z_MAX)
                _store(col_partial_ptr, places, inside, BLOCK_M, seen, SLOTS, Z_MAX)
        tl.debug_barrier()


@triton.jit
def _total(values, weight):
    """Weighted sum of a vector; what lies outside has weight 0 and may hold anything."""
    return tl.sum(tl.where(weight != 0, values * weight, 0.0), 0)


@triton.jit
def _same_label(own_ptr, other_ptr, offs, found, inside, LABELS: tl.constexpr):
    """1 where index ``found`` of the other side is a positive of ``offs``, else 0."""
    if LABELS:
        own = tl.load(own_ptr + offs, mask=inside, other=0)
        hit = own == tl.load(other_ptr + found, mask=inside, other=0)
    else:
        hit = found == offs
    return hit.to(tl.float32)


@triton.jit(do_not_specialize=_SCALARS, do_not_specialize_on_alignment=_SMALL)
def _combine_kernel(
    row_partial_ptr, col_partial_ptr,  # [groups, blocks, K, BLOCK_N] and [groups, blocks, K, BLOCK_M]
    labels_ptr, text_labels_ptr,  # [N], [M], or None
    scale_ptr,  # []
    row_stats_ptr, col_stats_ptr,  # [STAT_ROWS, N], [STAT_ROWS, M]
    sums_ptr,  # [2, grid 0, WIDTH], zeros: per block of rows (0) or columns (1) its share of every output
    margin, smoothing, N, M, row_groups, col_groups,
    K: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, LABELS: tl.constexpr,
    CONTRASTIVE: tl.constexpr, RELATIONAL: tl.constexpr, INTERACTIVE: tl.constexpr, CROSS: tl.constexpr,
    SMOOTHING: tl.constexpr, STATS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # 1. Rows or columns: the same work on other operands.
    side = tl.program_id(1)
    if side == 0:
        length, others, groups, block = N, M, row_groups, tl.full([], BLOCK_N, tl.int32)
        partial_ptr, stats_ptr = row_partial_ptr, row_stats_ptr
        own_ptr, other_ptr = labels_ptr, text_labels_ptr
    else:
        length, others, groups, block = M, N, col_groups, tl.full([], BLOCK_M, tl.int32)
        partial_ptr, stats_ptr = col_partial_ptr, col_stats_ptr
        own_ptr, other_ptr = text_labels_ptr, labels_ptr
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < length
    sums_ptr += (side * tl.num_programs(0) + tl.program_id(0)) * WIDTH

    # 2. Merge the partial statistics of all programs, in order.
    state = _empty(Z_MAX, COUNT, BLOCK)
    places = offs // block * (K * block) + offs % block
    for _ in range(groups):
        state = _merge(state, _load(partial_ptr, places, inside, block, SLOTS, Z_MAX, COUNT), SLOTS, Z_MAX)
        partial_ptr += tl.cdiv(length, block).to(tl.int64) * (K * block)

    # 3. Log-sum-exps and positive counts, saved for the backward pass.
    zero = tl.zeros([BLOCK], tl.float32)
    lse_z, lse_s, lse_t, lse_x, count = zero, zero, zero, zero, zero + 1.0
    if SLOTS[Z_MAX] >= 0:
        lse_z = state[Z_MAX] + tl.log2(state[Z_SUM])
    if SLOTS[S_MAX] >= 0:
        lse_s = state[S_MAX] + tl.log2(state[S_SUM])
    else:
        lse_s = lse_z
    if SLOTS[T_MAX] >= 0:
        lse_t = state[T_MAX] + tl.log2(state[T_SUM])
    if SLOTS[X_MAX] >= 0:
        lse_x = state[X_MAX] + tl.log2(state[X_SUM])
    if LABELS:
        count = state[COUNT]
    tl.store(stats_ptr + LSE_Z * length + offs, lse_z, mask=inside)
    tl.store(stats_ptr + LSE_S * length + offs, lse_s, mask=inside)
    tl.store(stats_ptr + LSE_T * length + offs, lse_t, mask=inside)
    tl.store(stats_ptr + LSE_X * length + offs, lse_x, mask=inside)
    tl.store(stats_ptr + POSITIVES * length + offs, count, mask=inside)

    # 4. This block's share of each term: half a mean over rows, half a mean over columns.
    weight = tl.where(inside, 0.5 * LN2 / length, 0.0)
    if CONTRASTIVE:
        target = state[Z_POSITIVE] / count  # 0/0 = NaN for a row without any positive
        if SMOOTHING:
            negatives = others - count
            shift = margin * tl.load(scale_ptr) * LOG2E
            soft = (1 - smoothing) * target + smoothing * (state[Z_NEGATIVE] / negatives + shift)
            target = tl.where(negatives == 0, target, soft)
        tl.store(sums_ptr + 0, _total(lse_z - target, weight))
    if RELATIONAL:
        tl.store(sums_ptr + 1, _total(state[T_MINUS_S] / state[T_SUM] - lse_t + lse_s, weight))
    if INTERACTIVE:
        tl.store(sums_ptr + 2, _total(lse_x - state[X_POSITIVE] / count, weight))
    if CROSS:
        tl.store(sums_ptr + 3, _total(state[T_MINUS_X] / state[T_SUM] - lse_t + lse_x, weight))

    # 5. Its share of each diagnostic, in the order of eager.stat_names.
    if STATS:
        mean = tl.where(inside, 1.0 / length, 0.0)
        s_sum = state[S_SUM]
        s_arg = tl.minimum(state[S_ARG].to(tl.int32), others - 1)  # all-NaN rows have no argmax
        ptr = sums_ptr + 4 + 4 * side
        tl.store(ptr + 0, _total(lse_s - state[S_SELF] / s_sum, mean * LN2))
        tl.store(ptr + 1, _total(1.0 / s_sum, mean))
        tl.store(ptr + 2, _total(state[S_HIT] / s_sum, mean))
        tl.store(ptr + 3, _total(_same_label(own_ptr, other_ptr, offs, s_arg, inside, LABELS), mean))
        if SLOTS[T_SELF] >= 0:
            t_sum = state[T_SUM]
            t_arg = tl.minimum(state[T_ARG].to(tl.int32), others - 1)
            ptr = sums_ptr + 12 + 4 * side
            tl.store(ptr + 0, _total(lse_t - state[T_SELF] / t_sum, mean * LN2))
            tl.store(ptr + 1, _total(1.0 / t_sum, mean))
            tl.store(ptr + 2, _total(state[T_HIT] / t_sum, mean))
            tl.store(ptr + 3, _total(_same_label(own_ptr, other_ptr, offs, t_arg, inside, LABELS), mean))
            ptr = sums_ptr + 20 + 2 * side
            tl.store(ptr + 0, _total((s_arg == t_arg).to(tl.float32), mean))
            tl.store(ptr + 1, _total(state[T_MINUS_S] / t_sum - lse_t + lse_s, mean * LN2))


# --------------------------------------------------------------------------------------------------
# Backward
# --------------------------------------------------------------------------------------------------


@triton.jit
def _target_weights(count, others, weight, smoothing, SMOOTHING: tl.constexpr):
    """Target q of a positive and of a negative beside ``count`` positives of ``others``, times ``weight``.

    NaN for rows without any positive, as in the forward pass.
    """
    positive = weight / count
    negative = tl.where(count == 0, float("nan"), 0.0)
    if SMOOTHING:
        negatives = others - count
        negative += weight * smoothing / tl.maximum(negatives, 1.0)
        positive = tl.where(negatives == 0, positive, positive * (1 - smoothing))
    return positive, negative


@triton.jit
def _store_strip(ptr, b_x, stride, row, offs_m, row_inside, col_inside):
    """Store a gradient tile in the strip's dtype, if there is a strip for it; ``row`` counts from its first."""
    if ptr is not None:
        offs = tl.arange(0, b_x.shape[0])[:, None] * stride + offs_m[None, :]
        inside = row_inside[:, None] & col_inside[None, :]
        tl.store(ptr + row * stride.to(tl.int64) + offs, b_x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SCALARS, do_not_specialize_on_alignment=_SMALL)
def _backward_kernel(
    grad_terms_ptr,  # [4]
    image_ptr, text_ptr, scale_ptr,  # [N, D], [M, D], []
    teacher_image_ptr, teacher_text_ptr, teacher_scale_ptr,  # [N, D], [M, D], [], or None
    labels_ptr, text_labels_ptr,  # [N], [M], or None
    row_stats_ptr, col_stats_ptr,  # [STAT_ROWS, N], [STAT_ROWS, M]
    ds_ptr, da_ptr, db_ptr, stride,  # strips [last − first, M] with row stride, or None
    d_scale_ptr,  # [grid 0, grid 1], or None
    margin, smoothing, N, M, width, first, last, rows, cols,  # the strip's rows; size of a rectangle
    D: tl.constexpr, LABELS: tl.constexpr, MARGIN: tl.constexpr, SMOOTHING: tl.constexpr,
    CONTRASTIVE: tl.constexpr, RELATIONAL: tl.constexpr, INTERACTIVE: tl.constexpr, CROSS: tl.constexpr,
    USE_S: tl.constexpr, USE_A: tl.constexpr, USE_B: tl.constexpr, USE_T: tl.constexpr, D_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # 1. The rectangle of this program within the strip.
    first_row, first_col = first + tl.program_id(0) * rows, tl.program_id(1) * cols

    # 2. Upstream gradients relative to the largest, so that no strip leaves a low precision's range.
    g_contrastive = tl.load(grad_terms_ptr + 0)
    g_relational = tl.load(grad_terms_ptr + 1)
    g_interactive = tl.load(grad_terms_ptr + 2)
    g_cross = tl.load(grad_terms_ptr + 3)
    largest = tl.maximum(
        tl.maximum(tl.abs(g_contrastive), tl.abs(g_relational)),
        tl.maximum(tl.abs(g_interactive), tl.abs(g_cross)),
    )
    largest = tl.where(largest == 0, 1.0, largest)
    g_contrastive /= largest
    g_relational /= largest
    g_interactive /= largest
    g_cross /= largest
    g_crossed = (g_interactive if INTERACTIVE else 0.0) + (g_cross if CROSS else 0.0)

    # 3. Rows are averaged over N, columns over M: both relative to the smaller of the two.
    row_weight = tl.minimum(N, M).to(tl.float32) / N
    col_weight = tl.minimum(N, M).to(tl.float32) / M
    scale = tl.load(scale_ptr) * LOG2E
    teacher_scale = scale
    if USE_T:
        teacher_scale = tl.load(teacher_scale_ptr) * LOG2E
    shift = margin * scale
    d_scale = tl.zeros([BLOCK_N], tl.float32)

    last_row, last_col = tl.minimum(first_row + rows, last), tl.minimum(first_col + cols, M)
    for row in range(first_row, last_row, BLOCK_N):
        offs_n = row + tl.arange(0, BLOCK_N)
        for col in tl.range(first_col, last_col, BLOCK_M, disable_licm=True):
            offs_m = col + tl.arange(0, BLOCK_M)

            # 4. The dot products of a tile and what is known about its rows and columns.
            b_s, b_a, b_b, b_t = _dots(
                image_ptr, text_ptr, teacher_image_ptr, teacher_text_ptr, row, col, N, M, width,
                D, USE_S, USE_A, USE_B, USE_T, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            b_positive = _positives(labels_ptr, text_labels_ptr, offs_n, offs_m, N, M, LABELS)
            # Products stay unscaled: σ's gradient is Σ ∂L/∂s u·v, also at σ = 0.
            row_inside, col_inside = offs_n < last, offs_m < M
            row_count = tl.load(
                row_stats_ptr + POSITIVES * N + offs_n, mask=row_inside, other=1.0
            )  # [BLOCK_N]
            col_count = tl.load(
                col_stats_ptr + POSITIVES * M + offs_m, mask=col_inside, other=1.0
            )  # [BLOCK_M]
            d_row = tl.zeros([BLOCK_N], tl.float32)
            b_ds = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)

            # 5. Along rows: interactive and cross act on a, relational on s.
            if USE_T:
                lse = tl.load(row_stats_ptr + LSE_T * N + offs_n, mask=row_inside, other=0.0)
                b_p = row_weight * tl.exp2(b_t * teacher_scale - lse[:, None])
                if RELATIONAL:
                    b_ds -= g_relational * b_p
            if USE_A:
                b_da = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                if CROSS:
                    b_da -= g_cross * b_p
                lse = tl.load(row_stats_ptr + LSE_X * N + offs_n, mask=row_inside, other=0.0)
                b_da += g_crossed * row_weight * tl.exp2(b_a * scale - lse[:, None])
                if INTERACTIVE:
                    hit, miss = _target_weights(row_count, M, g_interactive * row_weight, 0.0, False)
                    b_da -= tl.where(b_positive, hit[:, None], miss[:, None])
                if D_SCALE:
                    d_row += tl.sum(tl.where(col_inside[None, :], b_da * b_a, 0.0), 1)
                _store_strip(da_ptr, b_da, stride, row - first, offs_m, row_inside, col_inside)

            # 6. Along columns: the same on b and s.
            if USE_T:
                lse = tl.load(col_stats_ptr + LSE_T * M + offs_m, mask=col_inside, other=0.0)
                b_p = col_weight * tl.exp2(b_t * teacher_scale - lse[None, :])
                if RELATIONAL:
                    b_ds -= g_relational * b_p
            if USE_B:
                b_db = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                if CROSS:
                    b_db -= g_cross * b_p
                lse = tl.load(col_stats_ptr + LSE_X * M + offs_m, mask=col_inside, other=0.0)
                b_db += g_crossed * col_weight * tl.exp2(b_b * scale - lse[None, :])
                if INTERACTIVE:
                    hit, miss = _target_weights(col_count, N, g_interactive * col_weight, 0.0, False)
                    b_db -= tl.where(b_positive, hit[None, :], miss[None, :])
                if D_SCALE:
                    d_row += tl.sum(tl.where(col_inside[None, :], b_db * b_b, 0.0), 1)
                _store_strip(db_ptr, b_db, stride, row - first, offs_m, row_inside, col_inside)

            # 7. The student's softmaxes of the relational and the contrastive term, the latter's targets.
            if RELATIONAL:
                lse = tl.load(row_stats_ptr + LSE_S * N + offs_n, mask=row_inside, other=0.0)
                b_ds += g_relational * row_weight * tl.exp2(b_s * scale - lse[:, None])
                lse = tl.load(col_stats_ptr + LSE_S * M + offs_m, mask=col_inside, other=0.0)
                b_ds += g_relational * col_weight * tl.exp2(b_s * scale - lse[None, :])
            if CONTRASTIVE:
                b_z = b_s * scale
                if MARGIN:
                    b_z += tl.where(b_positive, 0.0, shift)
                lse = tl.load(row_stats_ptr + LSE_Z * N + offs_n, mask=row_inside, other=0.0)
                b_dz = g_contrastive * row_weight * tl.exp2(b_z - lse[:, None])
                lse = tl.load(col_stats_ptr + LSE_Z * M + offs_m, mask=col_inside, other=0.0)
                b_dz += g_contrastive * col_weight * tl.exp2(b_z - lse[None, :])
                hit, miss = _target_weights(row_count, M, g_contrastive * row_weight, smoothing, SMOOTHING)
                b_dz -= tl.where(b_positive, hit[:, None], miss[:, None])
                hit, miss = _target_weights(col_count, N, g_contrastive * col_weight, smoothing, SMOOTHING)
                b_dz -= tl.where(b_positive, hit[None, :], miss[None, :])
                if D_SCALE and MARGIN:  # ∂z/∂σ = u·v + δ on negatives: here the δ
                    b_miss = tl.where(b_positive, 0.0, b_dz)
                    d_row += margin * tl.sum(tl.where(col_inside[None, :], b_miss, 0.0), 1)
                b_ds += b_dz
            if USE_S:
                if D_SCALE:
                    d_row += tl.sum(tl.where(col_inside[None, :], b_ds * b_s, 0.0), 1)
                _store_strip(ds_ptr, b_ds, stride, row - first, offs_m, row_inside, col_inside)
            d_scale += tl.where(row_inside, d_row, 0.0)

    if D_SCALE:
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(d_scale_ptr + program, tl.sum(d_scale, 0))


# --------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------

# Least bound on the gradient strips of the backward pass, in bytes. Larger strips make fewer, fuller matrix
# products; below the size of a GPU's second-level cache they need not reach its memory.
STRIP_BYTES = 64 << 20


def strip_bound(N: int, M: int, D: int) -> int:
    """Default bound in bytes: as large as the float32 gradients of the features, where that is more.

    ∂L/∂v is summed over strips, so each strip reads and writes all of it. With a fixed bound their number would
    grow by N², and that traffic by N³.
    """
    return max(STRIP_BYTES, 4 * (N + M) * D)


class _Flags(NamedTuple):
    """What a call computes; every field is a compile-time constant of the kernels."""

    contrastive: bool
    relational: bool
    interactive: bool
    cross: bool
    margin: bool
    smoothing: bool
    labels: bool
    stats: bool
    teacher: bool  # teacher features were given

    @property
    def crossed(self) -> bool:
        return self.interactive or self.cross

    @property
    def measured(self) -> bool:
        return self.stats and self.teacher

    def slots(self) -> tuple[int, ...]:
        """Place of each statistic in the scratch, −1 for those that nothing needs."""
        # without a margin s is z, and the relational term takes z's log-sum-exp
        own = self.stats or (self.relational and (self.margin or not self.contrastive))
        needed = (
            (self.contrastive, (Z_MAX, Z_SUM, Z_POSITIVE)),
            (self.contrastive and self.smoothing, (Z_NEGATIVE,)),
            (own, (S_MAX, S_SUM)),
            (self.stats, (S_SELF, S_HIT, S_ARG)),
            (self.relational or self.cross or self.measured, (T_MAX, T_SUM)),
            (self.measured, (T_SELF, T_HIT, T_ARG)),
            (self.relational or self.measured, (T_MINUS_S,)),
            (self.cross, (T_MINUS_X,)),
            (self.crossed, (X_MAX, X_SUM)),
            (self.interactive, (X_POSITIVE,)),
            (self.labels and (self.contrastive or self.interactive), (COUNT,)),
        )
        active = {int(s) for wanted, statistics in needed if wanted for s in statistics}
        places = iter(range(len(active)))
        return tuple(next(places) if i in active else -1 for i in range(len(STATISTICS)))


def _launch(kernel: Any, grid: tuple[int, int], args: Sequence[Any], tile: Tile, **constants: Any) -> None:
    """Start ``kernel`` on ``grid`` programs. All launches pass here: benchmarks replace it to record them."""
    kernel[grid](*args, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages)


def _operands(
    image: Tensor, text: Tensor, logit_scale: Tensor, labels: Tensor | None, text_labels: Tensor | None,
    teacher_image: Tensor | None, teacher_text: Tensor | None, teacher_scale: Tensor | None,
) -> list[Any]:  # fmt: skip
    """The kernels' input operands in their order: contiguous, teacher in the student's dtype."""
    require_device(image)
    width = image.shape[1]
    if width % 8:
        raise ValueError(
            f"impl='triton' needs a feature width in multiples of 8, got {width}: use impl='eager'"
        )
    return [
        image.contiguous(),
        text.contiguous(),
        logit_scale.to(torch.float32),
        None if teacher_image is None else teacher_image.to(image.dtype).contiguous(),
        None if teacher_text is None else teacher_text.to(image.dtype).contiguous(),
        None if teacher_scale is None else teacher_scale.to(torch.float32),
        None if labels is None else labels.contiguous(),
        None if text_labels is None else text_labels.contiguous(),
    ]


@torch.no_grad()
def forward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None,
    text_labels: Tensor | None,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_scale: Tensor | None,
    margin: float,
    smoothing: float,
    enabled: Sequence[bool],
    stats: bool,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Terms, saved statistics and diagnostics; see ``eager.contrastive_terms`` for the arguments.

    Args:
        image: [N, D], text: [M, D], float32, bfloat16 or float16, D a multiple of 8.
        logit_scale, teacher_scale: 0-dim float32, on the same device.
        labels, text_labels: int64 [N] and [M], or both None: then N = M and positives are the diagonal.
        tile: overrides the table of ``_config``.

    Returns:
        ``(terms [4], row_stats [STAT_ROWS, N], col_stats [STAT_ROWS, M], diagnostics)``, all float32.
    """
    arguments = (
        image, text, logit_scale, labels, text_labels, teacher_image, teacher_text, teacher_scale,
        margin, smoothing, enabled, stats,
    )  # fmt: skip
    N, M, D = image.shape[0], text.shape[0], image.shape[1]
    contrastive, relational, interactive, cross = enabled
    flags = _Flags(
        contrastive, relational, interactive, cross, margin != 0, smoothing != 0, labels is not None,
        stats, teacher_image is not None,
    )  # fmt: skip
    slots = flags.slots()
    K = max(slots) + 1
    use_s = slots[Z_MAX] >= 0 or slots[S_MAX] >= 0
    use_t = slots[T_MAX] >= 0
    operands = _operands(
        image, text, logit_scale, labels, text_labels, teacher_image, teacher_text, teacher_scale
    )

    # 1. One walk over the logits.
    if tile is None:
        products = use_s + use_t + 2 * flags.crossed
        kind = "forward with stats" if stats else "forward"
        tile = _config.choose(kind, products, image, M, lambda t: forward(*arguments, tile=t))
    rows, cols = _config.rectangle(N, M, tile, image.device)
    grid = (triton.cdiv(N, rows), triton.cdiv(M, cols))
    tiles_n, tiles_m = triton.cdiv(N, tile.block_n), triton.cdiv(M, tile.block_m)
    row_partial = image.new_empty((grid[1], tiles_n, K, tile.block_n), dtype=torch.float32)
    col_partial = image.new_empty((grid[0], tiles_m, K, tile.block_m), dtype=torch.float32)
    parked = torch.empty_like(col_partial) if rows > tile.block_n else col_partial
    with device_guard(image):
        _launch(
            _forward_kernel, grid,
            (*operands, row_partial, col_partial, parked, float(margin), N, M, D, rows, cols), tile,
            K=K, SLOTS=slots, D=D, LABELS=flags.labels, MARGIN=flags.margin, USE_S=use_s, USE_X=flags.crossed,
            USE_T=use_t, PRECISION=_config.precision(image),
            BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, BLOCK_D=tile.block_d,
            MERGE=_config.MERGE,
        )  # fmt: skip

        # 2. Partials to log-sum-exps and terms.
        combine = _config.COMBINE
        width = 4 + (0 if not stats else 20 if flags.teacher else 8)
        row_stats = image.new_empty((STAT_ROWS, N), dtype=torch.float32)
        col_stats = image.new_empty((STAT_ROWS, M), dtype=torch.float32)
        grid_combine = (triton.cdiv(max(N, M), combine.block_n), 2)
        sums = image.new_zeros((2 * grid_combine[0], width), dtype=torch.float32)
        _launch(
            _combine_kernel, grid_combine,
            (row_partial, col_partial, *operands[-2:], operands[2], row_stats, col_stats, sums,
             float(margin), float(smoothing), N, M, grid[1], grid[0]),
            combine, K=K, SLOTS=slots, WIDTH=width, LABELS=flags.labels,
            CONTRASTIVE=flags.contrastive, RELATIONAL=flags.relational, INTERACTIVE=flags.interactive,
            CROSS=flags.cross, SMOOTHING=flags.smoothing, STATS=stats,
            BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, BLOCK=combine.block_n,
        )  # fmt: skip
    outputs = sums.sum(0)
    return outputs[:4].clone(), row_stats, col_stats, outputs[4:].clone()


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total + left @ right`` in float32, ``left`` and ``right`` in any one dtype."""
    if left.dtype == torch.float32:
        return left @ right if total is None else total.addmm_(left, right)
    if left.is_cuda and torch.version.hip is None:
        if total is None:
            return torch.mm(left, right, out_dtype=torch.float32)
        return torch.addmm(total, left, right, out_dtype=torch.float32)
    if left.is_cuda:  # no float32 output there: one rounding per strip, the sum over strips in float32
        product = (left @ right).float()
    else:  # the interpreter's CPU tensors
        product = left.float() @ right.float()
    return product if total is None else total.add_(product)


@torch.no_grad()
def backward(
    grad_terms: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None,
    text_labels: Tensor | None,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_scale: Tensor | None,
    row_stats: Tensor,
    col_stats: Tensor,
    margin: float,
    smoothing: float,
    enabled: Sequence[bool],
    needs: Sequence[bool],
    *,
    tile: Tile | None = None,
    strip_bytes: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``dot(grad_terms, terms)``; arguments as in :func:`forward`, and

    Args:
        grad_terms: [4], on the device; nothing here waits for its values.
        row_stats, col_stats: what :func:`forward` returned.
        needs: which of image, text and logit_scale need a gradient; no others are computed.
        strip_bytes: bound on the scratch for gradient strips (one row of tiles is the least); default:
            :func:`strip_bound`.

    Returns:
        ``(d_image [N, D], d_text [M, D], d_scale [])``, None where not needed.
    """
    need_image, need_text, need_scale = needs
    if not any(needs):
        return None, None, None
    N, M, D = image.shape[0], text.shape[0], image.shape[1]
    strip_bytes = strip_bound(N, M, D) if strip_bytes is None else strip_bytes
    contrastive, relational, interactive, cross = enabled
    operands = _operands(
        image, text, logit_scale, labels, text_labels, teacher_image, teacher_text, teacher_scale
    )
    u, v, scale, teacher_u, teacher_v = operands[:5]
    use_s = contrastive or relational
    use_a = (interactive or cross) and (need_image or need_scale)
    use_b = (interactive or cross) and (need_text or need_scale)
    use_t = relational or (cross and (use_a or use_b))

    # The kernels read rows without strides; an upstream gradient may be a broadcast number.
    grad_terms = grad_terms.to(torch.float32).contiguous()
    row_stats, col_stats = row_stats.contiguous(), col_stats.contiguous()

    # 1. Strips: as many rows at a time as the bound allows, in whole tiles.
    if tile is None:
        products = use_s + use_a + use_b + use_t
        arguments = (
            grad_terms, image, text, logit_scale, labels, text_labels, teacher_image, teacher_text,
            teacher_scale, row_stats, col_stats, margin, smoothing, enabled, needs,
        )  # fmt: skip
        tile = _config.choose(
            "backward", products, image, M, lambda t: backward(*arguments, tile=t, strip_bytes=strip_bytes)
        )
    store_s = use_s and (need_image or need_text)
    store_a, store_b = use_a and need_image, use_b and need_text
    stride = triton.cdiv(M, 16) * 16  # rows of a strip start on a boundary that wide stores can use
    row_bytes = max(1, (store_s + store_a + store_b) * stride * image.element_size())
    height = max(1, strip_bytes // row_bytes // tile.block_n) * tile.block_n
    height = min(height, triton.cdiv(N, tile.block_n) * tile.block_n) if row_bytes > 1 else N
    starts = range(0, N, height)

    def strip(wanted: bool) -> Tensor | None:
        return image.new_empty((min(height, N), stride)) if wanted else None

    ds, da, db = strip(store_s), strip(store_a), strip(store_b)
    rows, cols = _config.rectangle(min(height, N), M, tile, image.device)
    grid_cols = triton.cdiv(M, cols)
    programs = triton.cdiv(min(height, N), rows) * grid_cols
    d_scales = image.new_zeros((len(starts), programs), dtype=torch.float32) if need_scale else None

    # The kernel works relative to the largest upstream gradient and to the smaller side.
    gain = grad_terms.abs().amax() / (2 * min(N, M))
    d_image = torch.empty_like(u) if need_image else None
    d_text: Tensor | None = None
    with device_guard(image):
        for i, first in enumerate(starts):
            last = min(first + height, N)
            grid = (triton.cdiv(last - first, rows), grid_cols)
            _launch(
                _backward_kernel, grid,
                (grad_terms, *operands, row_stats, col_stats, ds, da, db, stride,
                 None if d_scales is None else d_scales[i], float(margin), float(smoothing),
                 N, M, D, first, last, rows, cols),
                tile, D=D, LABELS=labels is not None, MARGIN=margin != 0, SMOOTHING=smoothing != 0,
                CONTRASTIVE=contrastive, RELATIONAL=relational, INTERACTIVE=interactive, CROSS=cross,
                USE_S=use_s, USE_A=use_a, USE_B=use_b, USE_T=use_t, D_SCALE=need_scale,
                PRECISION=_config.precision(image),
                BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, BLOCK_D=tile.block_d,
            )  # fmt: skip

            # 2. ∂L/∂u of these rows is complete; ∂L/∂v sums over strips.
            taken = slice(0, last - first), slice(0, M)
            if d_image is not None:
                total = None
                if ds is not None:
                    total = _add_product(total, ds[taken], v)
                if da is not None:
                    total = _add_product(total, da[taken], teacher_v)
                if total is None:  # no term is enabled
                    d_image.zero_()
                else:
                    torch.mul(total, gain * scale, out=d_image[first:last])
            if need_text:
                if ds is not None:
                    d_text = _add_product(d_text, ds[taken].T, u[first:last])
                if db is not None:
                    d_text = _add_product(d_text, db[taken].T, teacher_u[first:last])
    if need_text:
        d_text = torch.zeros_like(v) if d_text is None else (d_text * (gain * scale)).to(text.dtype)
    return d_image, d_text, None if d_scales is None else d_scales.sum() * gain
