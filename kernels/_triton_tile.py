"""Pieces of the Triton loss kernels that forward and backward share: a tile's products, positives and statistics.

A tile is summarised along rows and along columns into *partial statistics*: running maxima, sums of exponentials,
and sums weighted by them. Partial statistics of disjoint sets of logits merge exactly (``merge``).

Logits live in base 2 (scaled by log₂e) so that every exponential is a bare ``exp2``.
"""

# mypy: disable-error-code="assignment"
# (kernels rebind names to tuples of other lengths, as Triton's language lets them)

from __future__ import annotations

from ._triton import tl, triton
from .contrastive import TERMS, Inputs, Options, Statistics

# How each partial statistic merges: M maximum, S sum relative to the last maximum before it, I index of that
# maximum (int32, the others float32), P plain sum.
MERGE_RULES = tl.constexpr("MSPP MSSSI MSSSISS MSPP".replace(" ", ""))
# Their order in a tuple of statistics. z: contrastive logits; s: student; t: teacher; x: the logits between the
# two, a along rows and b along columns; eˢ: 2^(s − max s); P: the positives.
# fmt: off
(
    Z_MAX, Z_SUM, Z_POSITIVE, Z_NEGATIVE,  # max z, Σ eᶻ, Σ_P s, Σ_¬P s (only with smoothing)
    S_MAX, S_SUM,  # max s, Σ eˢ
    S_SELF, S_MASS, S_ARG,  # diagnostics: Σ eˢ s, Σ_P eˢ, the first argmax
    T_MAX, T_SUM, T_SELF, T_MASS, T_ARG,  # the same of the teacher
    T_MINUS_S, T_MINUS_X,  # Σ eᵗ (t − s), Σ eᵗ (t − x)
    X_MAX, X_SUM, X_POSITIVE,  # max x, Σ eˣ, Σ_P x
    COUNT,  # |P|; without labels it is known to be 1
) = PARTIALS = tuple(tl.constexpr(i) for i in range(len(MERGE_RULES.value)))
# fmt: on
# Their names, in the same order.
# fmt: off
PARTIAL_NAMES = (
    "max_z", "sum_z", "positive_s", "negative_s",
    "max_s", "sum_s", "mean_s", "mass_s", "arg_s",
    "max_t", "sum_t", "mean_t", "mass_t", "arg_t", "gap_s", "gap_x",
    "max_x", "sum_x", "positive_x", "positives",
)
# fmt: on
# Of the statistics that a model has of its own logits, the place of the first diagnostic after the maximum.
OWN_DIAGNOSTICS = tl.constexpr(S_SELF.value - S_MAX.value)

# Rows of the saved statistics.
LSE_Z, LSE_S, LSE_T, LSE_X, POSITIVES = (
    tl.constexpr(Statistics._fields.index(name)) for name in ("lse_z", "lse_s", "lse_t", "lse_x", "positives")
)
# Places in a vector of terms.
TERM_CONTRASTIVE, TERM_RELATIONAL, TERM_INTERACTIVE, TERM_CROSS = (
    tl.constexpr(TERMS.index(name)) for name in ("contrastive", "relational", "interactive", "cross")
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The logit of a pair outside the matrix. Finite, so that differences of two of them are 0, not NaN.
OUTSIDE = tl.constexpr(-1.0e30)

# Parameters that select no compiled variant: numbers by their value, small operands by their alignment.
# fmt: off
NUMBERS = [
    "margin", "smoothing", "N", "M", "width", "whole_n", "whole_m", "first", "last", "rows", "cols",
    "row_groups", "col_groups", "length", "groups",
]
SMALL_OPERANDS = [
    "grad_terms_ptr", "logit_scale_ptr", "teacher_factor_ptr", "labels_ptr", "text_labels_ptr",
    "d_logit_scale_ptr", "weights_ptr", "upstream_ptr", "logit_bias_ptr", "teacher_logit_bias_ptr", "outputs_ptr",
]
# fmt: on


def slots_of(inputs: Inputs, options: Options) -> tuple[int, ...]:
    """Return the place of each partial statistic in the scratch, −1 for those that nothing needs."""
    # Without a margin s is z, and the relational term takes z's log-sum-exp.
    own = options.stats or (options.relational and (options.margin != 0 or not options.contrastive))
    measured = options.stats and inputs.has_teacher
    needed = (
        (options.contrastive, (Z_MAX, Z_SUM, Z_POSITIVE)),
        (options.contrastive and options.smoothing != 0, (Z_NEGATIVE,)),
        (own, (S_MAX, S_SUM)),
        (options.stats, (S_SELF, S_MASS, S_ARG)),
        (options.relational or options.cross or measured, (T_MAX, T_SUM)),
        (measured, (T_SELF, T_MASS, T_ARG)),
        (options.relational or measured, (T_MINUS_S,)),
        (options.cross, (T_MINUS_X,)),
        (options.crossed, (X_MAX, X_SUM)),
        (options.interactive, (X_POSITIVE,)),
        (inputs.labels is not None and (options.contrastive or options.interactive), (COUNT,)),
    )
    active = {int(s) for wanted, statistics in needed if wanted for s in statistics}
    places = iter(range(len(active)))
    return tuple(next(places) if i in active else -1 for i in range(len(PARTIALS)))


@triton.jit
def empty_statistics(FIRST: tl.constexpr, LAST: tl.constexpr, LENGTH: tl.constexpr):
    """Return statistics FIRST to LAST of no logits at all: merging them changes nothing."""
    state = ()
    for i in tl.static_range(FIRST, LAST + 1):
        if MERGE_RULES[i] == "M":
            state += (tl.full([LENGTH], OUTSIDE, tl.float32),)
        elif MERGE_RULES[i] == "I":
            state += (tl.zeros([LENGTH], tl.int32),)
        else:
            state += (tl.zeros([LENGTH], tl.float32),)
    return state


@triton.jit
def scratch_offsets(offs, K: tl.constexpr, BLOCK: tl.constexpr):
    """Return where the scratch [blocks, K, BLOCK] holds the first statistic of rows or columns ``offs``.

    Statistic number i lies i · BLOCK further, a distance known at compile time: no register holds it.
    """
    return offs // BLOCK * (K * BLOCK) + offs % BLOCK


@triton.jit
def load_statistics(ptr, places, inside, block, SLOTS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Load statistics FIRST to LAST from the scratch; what is not inside is not read."""
    state = ()
    for i in tl.static_range(FIRST, LAST + 1):
        if SLOTS[i] >= 0:
            loaded = tl.load(ptr + (places + SLOTS[i] * block), mask=inside, other=0.0)
            if MERGE_RULES[i] == "I":
                loaded = loaded.to(tl.int32, bitcast=True)
            state += (loaded,)
        else:
            state += (tl.zeros(places.shape, tl.float32),)
    return state


@triton.jit
def store_statistics(ptr, places, inside, block, state, SLOTS: tl.constexpr, FIRST: tl.constexpr):
    """Store the statistics from FIRST on in the scratch, indices as the bits of a float."""
    for i in tl.static_range(len(state)):
        if SLOTS[FIRST + i] >= 0:
            stored = state[i]
            if MERGE_RULES[FIRST + i] == "I":
                stored = stored.to(tl.float32, bitcast=True)
            tl.store(ptr + (places + SLOTS[FIRST + i] * block), stored, mask=inside)


@triton.jit
def merge(p, q, SLOTS: tl.constexpr, FIRST: tl.constexpr):
    """Return the statistics, from FIRST on, of the union of two disjoint sets of logits, p's before q's."""
    state = ()
    for i in tl.static_range(len(p)):
        if SLOTS[FIRST + i] < 0:
            state += (p[i],)
        elif MERGE_RULES[FIRST + i] == "M":
            top = tl.maximum(p[i], q[i])
            keep_p = tl.exp2(p[i] - top)
            keep_q = tl.exp2(q[i] - top)
            later = q[i] > p[i]  # a tie keeps the first index
            state += (top,)
        elif MERGE_RULES[FIRST + i] == "S":
            state += (p[i] * keep_p + q[i] * keep_q,)
        elif MERGE_RULES[FIRST + i] == "I":
            state += (tl.where(later, q[i], p[i]),)
        else:
            state += (p[i] + q[i],)
    return state


@triton.jit
def _softmax(b_x, AXIS: tl.constexpr):
    """Return maximum and sum of exponentials of a tile along an axis, and the exponentials themselves."""
    top = tl.max(b_x, AXIS)
    b_e = tl.exp2(b_x - tl.expand_dims(top, AXIS))
    return top, tl.sum(b_e, AXIS), b_e


@triton.jit
def _first(b_x, top, offs, AXIS: tl.constexpr):
    """Return the index of the first entry that equals ``top`` in int32; 2^31 − 1 where none does, as among NaN."""
    b_is_maximum = b_x == tl.expand_dims(top, AXIS)
    return tl.min(tl.where(b_is_maximum, tl.expand_dims(offs, 1 - AXIS), 0x7FFFFFFF), AXIS)


# What one tile contributes, one function per kind of logits, so that few tiles are alive at a time. The pads
# are 0 inside the matrix and OUTSIDE beyond; tiles are 0 beyond, so plain sums need no mask.


@triton.jit
def contrastive_part(
    b_s, b_positive, has_positives, shift, row_pad, col_pad,
    SLOTS: tl.constexpr, MARGIN: tl.constexpr, ONE_WAY: tl.constexpr = False,
):  # fmt: skip
    """Return Z_MAX … Z_NEGATIVE of the student's logits b_s; ``shift`` is the margin's share of z on negatives.

    ONE_WAY leaves those of the columns 0.
    """
    row_zero, col_zero = tl.zeros([b_s.shape[0]], tl.float32), tl.zeros([b_s.shape[1]], tl.float32)
    row_max, row_sum, row_positive, row_negative = row_zero, row_zero, row_zero, row_zero
    col_max, col_sum, col_positive, col_negative = col_zero, col_zero, col_zero, col_zero
    if SLOTS[Z_POSITIVE] >= 0:  # noqa: SIM102 (decided by the compiler, the inner one by the program)
        if has_positives:
            b_at_positives = tl.where(b_positive, b_s, 0.0)
            row_positive = tl.sum(b_at_positives, 1)
            if not ONE_WAY:
                col_positive = tl.sum(b_at_positives, 0)
    if SLOTS[Z_NEGATIVE] >= 0:
        b_at_negatives = tl.where(b_positive, 0.0, b_s)
        row_negative = tl.sum(b_at_negatives, 1)
        if not ONE_WAY:
            col_negative = tl.sum(b_at_negatives, 0)
    if SLOTS[Z_MAX] >= 0:
        b_z = b_s
        if MARGIN:
            b_z = b_s + tl.where(b_positive, 0.0, shift)
        row_max, row_sum, _ = _softmax(b_z + col_pad, 1)
        if not ONE_WAY:
            col_max, col_sum, _ = _softmax(b_z + row_pad, 0)
    return (row_max, row_sum, row_positive, row_negative), (col_max, col_sum, col_positive, col_negative)


@triton.jit
def own_part(b_x, b_positive, offs, pad, SLOTS: tl.constexpr, FIRST: tl.constexpr, AXIS: tl.constexpr):
    """Return S_MAX … S_ARG or T_MAX … T_ARG along an axis with indices ``offs``, and the exponentials."""
    zero = tl.zeros([b_x.shape[1 - AXIS]], tl.float32)
    top, total, weighed, mass, b_e = zero, zero, zero, zero, b_x
    arg = tl.zeros([b_x.shape[1 - AXIS]], tl.int32)
    if SLOTS[FIRST] >= 0:
        top, total, b_e = _softmax(b_x + pad, AXIS)
    if SLOTS[FIRST + OWN_DIAGNOSTICS] >= 0:
        weighed = tl.sum(b_e * b_x, AXIS)
        mass = tl.sum(tl.where(b_positive, b_e, 0.0), AXIS)
        arg = _first(b_x + pad, top, offs, AXIS)
    return (top, total, weighed, mass, arg), b_e


@triton.jit
def teacher_part(b_t, b_s, b_x, b_positive, offs, pad, SLOTS: tl.constexpr, AXIS: tl.constexpr):
    """Return T_MAX … T_MINUS_X along an axis with indices ``offs``."""
    zero = tl.zeros([b_t.shape[1 - AXIS]], tl.float32)
    minus_s, minus_x = zero, zero
    own, b_e = own_part(b_t, b_positive, offs, pad, SLOTS, T_MAX, AXIS)
    if SLOTS[T_MINUS_S] >= 0:
        minus_s = tl.sum(b_e * (b_t - b_s), AXIS)
    if SLOTS[T_MINUS_X] >= 0:
        minus_x = tl.sum(b_e * (b_t - b_x), AXIS)
    return own + (minus_s, minus_x)


@triton.jit
def cross_part(b_x, b_positive, has_positives, inside, pad, SLOTS: tl.constexpr, AXIS: tl.constexpr):
    """Return X_MAX … COUNT along an axis."""
    zero = tl.zeros([b_x.shape[1 - AXIS]], tl.float32)
    top, total, positive, count = zero, zero, zero, zero
    if SLOTS[COUNT] >= 0:
        ones = tl.expand_dims(tl.where(inside, 1.0, 0.0), 1 - AXIS)
        count = tl.sum(tl.where(b_positive, ones, 0.0), AXIS)
    if SLOTS[X_POSITIVE] >= 0:  # noqa: SIM102 (decided by the compiler, the inner one by the program)
        if has_positives:
            positive = tl.sum(tl.where(b_positive, b_x, 0.0), AXIS)
    if SLOTS[X_MAX] >= 0:
        top, total, _ = _softmax(b_x + pad, AXIS)
    return top, total, positive, count


# --------------------------------------------------------------------------------------------------
# The visit of one tile, shared by forward and backward
# --------------------------------------------------------------------------------------------------


@triton.jit
def dots(
    image_ptr, text_ptr, teacher_image_ptr, teacher_text_ptr, row, col, N, M, width,
    D: tl.constexpr, USE_S: tl.constexpr, USE_A: tl.constexpr, USE_B: tl.constexpr, USE_T: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the tiles u·v, u·v', u'·v, u'·v' [BLOCK_N, BLOCK_M] at (row, col) in float32; 0 outside the matrix.

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
def positive_pairs(labels_ptr, text_labels_ptr, offs_n, offs_m, N, M, LABELS: tl.constexpr):
    """Return which pairs of a tile are positives; outside the matrix the answer means nothing."""
    if LABELS:
        row_label = tl.load(labels_ptr + offs_n, mask=offs_n < N, other=0)  # [BLOCK_N]
        col_label = tl.load(text_labels_ptr + offs_m, mask=offs_m < M, other=0)  # [BLOCK_M]
        return row_label[:, None] == col_label[None, :]
    else:
        return offs_n[:, None] == offs_m[None, :]


@triton.jit
def may_have_positives(row, col, LABELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return whether the tile at (row, col) may have positives: without labels they lie on the diagonal alone."""
    if LABELS:
        return True
    else:
        return (row < col + BLOCK_M) & (col < row + BLOCK_N)
