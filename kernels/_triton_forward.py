"""The Triton kernels of the forward pass: the walk over the logits, and the merging of its partial statistics.

**Walk.** Each program walks its rectangle tile by tile. Row statistics stay in registers; column statistics go to
a part of the scratch that only this program touches. No atomics: two runs agree bit for bit.

**Combine.** A small kernel merges the partials of all programs, in order, into log-sum-exps, terms and
diagnostics.
"""

# mypy: disable-error-code="assignment"
# (kernels rebind names to tuples of other lengths, as Triton's language lets them)

from __future__ import annotations

from ._triton import tl, triton
from ._triton_tile import (
    COUNT,
    LN2,
    LOG2E,
    LSE_S,
    LSE_T,
    LSE_X,
    LSE_Z,
    NUMBERS,
    OUTSIDE,
    POSITIVES,
    S_ARG,
    S_MASS,
    S_MAX,
    S_SELF,
    S_SUM,
    SMALL_OPERANDS,
    T_ARG,
    T_MASS,
    T_MAX,
    T_MINUS_S,
    T_MINUS_X,
    T_SELF,
    T_SUM,
    TERM_CONTRASTIVE,
    TERM_CROSS,
    TERM_INTERACTIVE,
    TERM_RELATIONAL,
    X_MAX,
    X_POSITIVE,
    X_SUM,
    Z_MAX,
    Z_NEGATIVE,
    Z_POSITIVE,
    Z_SUM,
    contrastive_part,
    cross_part,
    dots,
    empty_statistics,
    load_statistics,
    may_have_positives,
    merge,
    own_part,
    positive_pairs,
    scratch_offsets,
    store_statistics,
    teacher_part,
)
from .contrastive import MODEL_DIAGNOSTICS, PAIR_DIAGNOSTICS, TERMS, diagnostic_names

# Places of the combine kernel's outputs: the terms, then the diagnostics of each model and direction.
OUTPUTS = TERMS + diagnostic_names(has_teacher=True)
STUDENT, TEACHER, PAIR = (
    tl.constexpr(OUTPUTS.index(name))
    for name in (
        f"student/image_to_text/{MODEL_DIAGNOSTICS[0]}",
        f"teacher/image_to_text/{MODEL_DIAGNOSTICS[0]}",
        f"pair/image_to_text/{PAIR_DIAGNOSTICS[0]}",
    )
)
PER_MODEL, PER_PAIR = tl.constexpr(len(MODEL_DIAGNOSTICS)), tl.constexpr(len(PAIR_DIAGNOSTICS))
ENTROPY, CONFIDENCE, POSITIVE_PROBABILITY, ACCURACY = (
    tl.constexpr(MODEL_DIAGNOSTICS.index(name))
    for name in ("entropy", "confidence", "positive_probability", "accuracy")
)
AGREEMENT, KL = (tl.constexpr(PAIR_DIAGNOSTICS.index(name)) for name in ("agreement", "kl"))


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL_OPERANDS)
def forward_kernel(
    image_ptr, text_ptr, logit_scale_ptr,  # [N, D], [M, D], []
    teacher_image_ptr, teacher_text_ptr, teacher_factor_ptr,  # [N, D], [M, D], σ'/T [], or None
    labels_ptr, text_labels_ptr,  # [N], [M], or None
    row_partial_ptr, col_partial_ptr, parked_ptr,  # [grid 1, blocks of rows, K, BLOCK_N], columns likewise, twice
    margin, N, M, width, rows, cols,  # rows, cols: size of a program's rectangle, in whole tiles
    K: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, LABELS: tl.constexpr, MARGIN: tl.constexpr,
    ONE_WAY: tl.constexpr, USE_S: tl.constexpr, USE_X: tl.constexpr, USE_T: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    # 1. The rectangle, and where its partial statistics go.
    first_row, first_col = tl.program_id(0) * rows, tl.program_id(1) * cols
    last_row, last_col = tl.minimum(first_row + rows, N), tl.minimum(first_col + cols, M)
    row_partial_ptr += tl.program_id(1).to(tl.int64) * tl.cdiv(N, BLOCK_N) * (K * BLOCK_N)
    col_partial_ptr += tl.program_id(0).to(tl.int64) * tl.cdiv(M, BLOCK_M) * (K * BLOCK_M)
    parked_ptr += tl.program_id(0).to(tl.int64) * tl.cdiv(M, BLOCK_M) * (K * BLOCK_M)

    # 2. Scales into base 2.
    scale = tl.load(logit_scale_ptr) * LOG2E
    teacher_factor = scale
    if USE_T:
        teacher_factor = tl.load(teacher_factor_ptr) * LOG2E
    shift = margin * scale

    for row in range(first_row, last_row, BLOCK_N):
        offs_n = row + tl.arange(0, BLOCK_N)
        z, s = empty_statistics(Z_MAX, Z_NEGATIVE, BLOCK_N), empty_statistics(S_MAX, S_ARG, BLOCK_N)
        t, x = empty_statistics(T_MAX, T_MINUS_X, BLOCK_N), empty_statistics(X_MAX, COUNT, BLOCK_N)
        # The first row of tiles starts the column statistics; later rows park their statistics to be merged.
        if row == first_row:
            park_ptr = col_partial_ptr
        else:
            park_ptr = parked_ptr

        for col in tl.range(first_col, last_col, BLOCK_M, disable_licm=True):
            offs_m = col + tl.arange(0, BLOCK_M)

            # 3. The dot products and the positives of a tile.
            b_s, b_a, b_b, b_t = dots(
                image_ptr, text_ptr, teacher_image_ptr, teacher_text_ptr, row, col, N, M, width,
                D, USE_S, USE_X, USE_X and not ONE_WAY, USE_T, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            b_positive = positive_pairs(labels_ptr, text_labels_ptr, offs_n, offs_m, N, M, LABELS)
            has_positives = may_have_positives(row, col, LABELS, BLOCK_N, BLOCK_M)

            b_s, b_a, b_b, b_t = b_s * scale, b_a * scale, b_b * scale, b_t * teacher_factor
            row_inside, col_inside = offs_n < N, offs_m < M
            row_pad = tl.where(row_inside, 0.0, OUTSIDE)[:, None]
            col_pad = tl.where(col_inside, 0.0, OUTSIDE)[None, :]

            # 4. Their statistics: those of rows merge into registers; those of columns, which are spread
            #    over all warps, go to this program's part of the scratch at once.
            places = scratch_offsets(offs_m, K, BLOCK_M)
            row_part, col_part = contrastive_part(
                b_s, b_positive, has_positives, shift, row_pad, col_pad, SLOTS, MARGIN, ONE_WAY
            )  # fmt: skip
            if not ONE_WAY:
                store_statistics(park_ptr, places, col_inside, BLOCK_M, col_part, SLOTS, Z_MAX)
            z = merge(z, row_part, SLOTS, Z_MAX)

            if not ONE_WAY:
                col_part, _ = own_part(b_s, b_positive, offs_n, row_pad, SLOTS, S_MAX, 0)
                store_statistics(park_ptr, places, col_inside, BLOCK_M, col_part, SLOTS, S_MAX)
            row_part, _ = own_part(b_s, b_positive, offs_m, col_pad, SLOTS, S_MAX, 1)
            s = merge(s, row_part, SLOTS, S_MAX)

            if not ONE_WAY:
                col_part = teacher_part(b_t, b_s, b_b, b_positive, offs_n, row_pad, SLOTS, 0)
                store_statistics(park_ptr, places, col_inside, BLOCK_M, col_part, SLOTS, T_MAX)
            row_part = teacher_part(b_t, b_s, b_a, b_positive, offs_m, col_pad, SLOTS, 1)
            t = merge(t, row_part, SLOTS, T_MAX)

            if not ONE_WAY:
                col_part = cross_part(b_b, b_positive, has_positives, row_inside, row_pad, SLOTS, 0)
                store_statistics(park_ptr, places, col_inside, BLOCK_M, col_part, SLOTS, X_MAX)
            row_part = cross_part(b_a, b_positive, has_positives, col_inside, col_pad, SLOTS, 1)
            x = merge(x, row_part, SLOTS, X_MAX)

        # 5. Rows are complete.
        row_places = scratch_offsets(offs_n, K, BLOCK_N)
        store_statistics(row_partial_ptr, row_places, offs_n < N, BLOCK_N, z + s + t + x, SLOTS, Z_MAX)

        # 6. Merge what this row of tiles has parked, between barriers: other threads wrote it.
        if not ONE_WAY and row > first_row:
            tl.debug_barrier()
            for col in range(first_col, last_col, MERGE):
                offs = col + tl.arange(0, MERGE)
                places, inside = scratch_offsets(offs, K, BLOCK_M), offs < last_col
                seen = load_statistics(col_partial_ptr, places, inside, BLOCK_M, SLOTS, Z_MAX, COUNT)
                new = load_statistics(parked_ptr, places, inside, BLOCK_M, SLOTS, Z_MAX, COUNT)
                seen = merge(seen, new, SLOTS, Z_MAX)
                store_statistics(col_partial_ptr, places, inside, BLOCK_M, seen, SLOTS, Z_MAX)
        tl.debug_barrier()


@triton.jit
def _merge_groups(
    partial_ptr, offs, length, groups, block, K: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the statistics of rows or columns ``offs`` merged over all groups of programs, in order."""
    state = empty_statistics(Z_MAX, COUNT, BLOCK)
    places = offs // block * (K * block) + offs % block
    for _ in range(groups):
        new = load_statistics(partial_ptr, places, offs < length, block, SLOTS, Z_MAX, COUNT)
        state = merge(state, new, SLOTS, Z_MAX)
        partial_ptr += tl.cdiv(length, block).to(tl.int64) * (K * block)
    return state


@triton.jit(do_not_specialize=NUMBERS)
def merge_kernel(
    partial_ptr,  # [groups, blocks, K, PART]
    merged_ptr,  # [K, length]
    length, groups,
    K: tl.constexpr, SLOTS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the partial statistics of all programs, for a rectangle whose rows and columns are not whole."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    state = _merge_groups(partial_ptr, offs, length, groups, PART, K, SLOTS, BLOCK)
    store_statistics(merged_ptr, offs, offs < length, length, state, SLOTS, Z_MAX)


@triton.jit
def _total(values, weight):
    """Return the weighted sum of a vector; what lies outside has weight 0 and may hold anything."""
    return tl.sum(tl.where(weight != 0, values * weight, 0.0), 0)


@triton.jit
def _same_label(own_ptr, other_ptr, offs, predicted, inside, LABELS: tl.constexpr):
    """Return 1 where index ``predicted`` of the other side is a positive of ``offs``, else 0."""
    if LABELS:
        own = tl.load(own_ptr + offs, mask=inside, other=0)
        is_positive = own == tl.load(other_ptr + predicted, mask=inside, other=0)
    else:
        is_positive = predicted == offs
    return is_positive.to(tl.float32)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL_OPERANDS)
def combine_kernel(
    row_partial_ptr, col_partial_ptr,  # [groups, blocks, K, BLOCK_N] and [groups, blocks, K, BLOCK_M]
    labels_ptr, text_labels_ptr,  # [N], [M], or None
    logit_scale_ptr,  # []
    row_stats_ptr, col_stats_ptr,  # [len(Statistics), N], [len(Statistics), M]
    sums_ptr,  # [2, grid 0, WIDTH], zeros: per block of rows (0) or columns (1) its share of every output
    margin, smoothing, N, M, row_groups, col_groups,
    K: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, LABELS: tl.constexpr,
    CONTRASTIVE: tl.constexpr, RELATIONAL: tl.constexpr, INTERACTIVE: tl.constexpr, CROSS: tl.constexpr,
    SMOOTHING: tl.constexpr, STATS: tl.constexpr, IGNORE: tl.constexpr,
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
    state = _merge_groups(partial_ptr, offs, length, groups, block, K, SLOTS, BLOCK)

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

    # 4. This block's share of each term: half a mean over rows, half a mean over columns. What is left out of the
    #    means weighs nothing, and the launcher corrects the length.
    counts = inside
    if IGNORE:
        counts = inside & (count > 0)
    weight = tl.where(counts, 0.5 * LN2 / length, 0.0)
    if CONTRASTIVE:
        target = state[Z_POSITIVE] / count  # 0/0 = NaN for a row without any positive
        if SMOOTHING:
            negatives = others - count
            shift = margin * tl.load(logit_scale_ptr) * LOG2E
            soft = (1 - smoothing) * target + smoothing * (state[Z_NEGATIVE] / negatives + shift)
            target = tl.where(negatives == 0, target, soft)
        tl.store(sums_ptr + TERM_CONTRASTIVE, _total(lse_z - target, weight))
    if RELATIONAL:
        tl.store(sums_ptr + TERM_RELATIONAL, _total(state[T_MINUS_S] / state[T_SUM] - lse_t + lse_s, weight))
    if INTERACTIVE:
        tl.store(sums_ptr + TERM_INTERACTIVE, _total(lse_x - state[X_POSITIVE] / count, weight))
    if CROSS:
        tl.store(sums_ptr + TERM_CROSS, _total(state[T_MINUS_X] / state[T_SUM] - lse_t + lse_x, weight))

    # 5. Its share of each diagnostic, in the order of diagnostic_names.
    if STATS:
        mean = tl.where(counts, 1.0 / length, 0.0)
        s_sum = state[S_SUM]
        # An all-NaN row has no argmax; whatever its index holds, no address may come from it.
        s_arg = tl.maximum(tl.minimum(state[S_ARG], others - 1), 0)
        ptr = sums_ptr + STUDENT + PER_MODEL * side
        tl.store(ptr + ENTROPY, _total(lse_s - state[S_SELF] / s_sum, mean * LN2))
        tl.store(ptr + CONFIDENCE, _total(1.0 / s_sum, mean))
        tl.store(ptr + POSITIVE_PROBABILITY, _total(state[S_MASS] / s_sum, mean))
        s_right = _same_label(own_ptr, other_ptr, offs, s_arg, inside, LABELS)
        tl.store(ptr + ACCURACY, _total(s_right, mean))
        if SLOTS[T_SELF] >= 0:
            t_sum = state[T_SUM]
            t_arg = tl.maximum(tl.minimum(state[T_ARG], others - 1), 0)
            ptr = sums_ptr + TEACHER + PER_MODEL * side
            tl.store(ptr + ENTROPY, _total(lse_t - state[T_SELF] / t_sum, mean * LN2))
            tl.store(ptr + CONFIDENCE, _total(1.0 / t_sum, mean))
            tl.store(ptr + POSITIVE_PROBABILITY, _total(state[T_MASS] / t_sum, mean))
            t_right = _same_label(own_ptr, other_ptr, offs, t_arg, inside, LABELS)
            tl.store(ptr + ACCURACY, _total(t_right, mean))
            ptr = sums_ptr + PAIR + PER_PAIR * side
            tl.store(ptr + AGREEMENT, _total((s_arg == t_arg).to(tl.float32), mean))
            tl.store(ptr + KL, _total(state[T_MINUS_S] / t_sum - lse_t + lse_s, mean * LN2))
