"""The Triton kernel of the backward pass.

The same visit as in the forward pass recomputes the tiles; with the saved log-sum-exps every probability is one
exponential, so ∂L/∂s, ∂L/∂a, ∂L/∂b form in registers. They are written, in the inputs' dtype, to a strip of rows,
from which the launcher's matrix products take the gradients of the features.
"""

from __future__ import annotations

from ._triton import tl, triton
from ._triton_tile import (
    LOG2E,
    LSE_S,
    LSE_T,
    LSE_X,
    LSE_Z,
    NUMBERS,
    POSITIVES,
    SMALL_OPERANDS,
    TERM_CONTRASTIVE,
    TERM_CROSS,
    TERM_INTERACTIVE,
    TERM_RELATIONAL,
    dots,
    positive_pairs,
)  # fmt: skip


@triton.jit
def _target_weights(count, others, weight, smoothing, SMOOTHING: tl.constexpr):
    """Return ``weight`` times the target q of a positive and of a negative.

    A row has ``count`` positives among ``others``; without any both are NaN, as in the forward pass.
    """
    positive = weight / count
    negative = tl.where(count == 0, float("nan"), 0.0)
    if SMOOTHING:
        negatives = others - count
        negative += weight * smoothing / tl.maximum(negatives, 1.0)
        positive = tl.where(negatives == 0, positive, positive * (1 - smoothing))
    return positive, negative


@triton.jit
def _store_strip(ptr, b_x, stride, row, offs_m, row_inside):
    """Store a gradient tile in the strip's dtype, if there is a strip for it; ``row`` counts from its first.

    A strip's rows end with a whole tile, so columns need no mask: what lies beyond the last text is never read.
    Columns start on a multiple of the tile, rows on one of ``stride``, and a thread stores 16 bytes at once.
    """
    if ptr is not None:
        offs = tl.arange(0, b_x.shape[0])[:, None] * stride + offs_m[None, :]
        first = row * stride.to(tl.int64)
        tl.store(ptr + first + offs, b_x.to(ptr.dtype.element_ty), mask=row_inside[:, None])


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=SMALL_OPERANDS)
def backward_kernel(
    grad_terms_ptr,  # [len(TERMS)]
    image_ptr, text_ptr, logit_scale_ptr,  # [N, D], [M, D], []
    teacher_image_ptr, teacher_text_ptr, teacher_factor_ptr,  # [N, D], [M, D], σ'/T [], or None
    labels_ptr, text_labels_ptr,  # [N], [M], or None
    row_stats_ptr, col_stats_ptr,  # [len(Statistics), N], [len(Statistics), M]
    ds_ptr, da_ptr, db_ptr, stride,  # strips [last − first, M rounded up to whole tiles] with row stride, or None
    d_logit_scale_ptr,  # [grid 0, grid 1], or None
    weights_ptr,  # [2], of a row and of a column relative to the larger, or None for one over their numbers
    margin, smoothing, N, M, width, whole_n, whole_m,  # size of the matrix that the N×M logits are a part of
    first, last, rows, cols,  # the strip's rows; size of a rectangle
    D: tl.constexpr, LABELS: tl.constexpr, MARGIN: tl.constexpr, SMOOTHING: tl.constexpr,
    CONTRASTIVE: tl.constexpr, RELATIONAL: tl.constexpr, INTERACTIVE: tl.constexpr, CROSS: tl.constexpr,
    USE_S: tl.constexpr, USE_A: tl.constexpr, USE_B: tl.constexpr, USE_T: tl.constexpr,
    ONE_WAY: tl.constexpr, D_LOGIT_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # 1. The rectangle of this program within the strip.
    first_row = first + tl.program_id(0) * rows
    first_col = tl.program_id(1) * (cols // BLOCK_M) * BLOCK_M  # so the compiler knows that it starts a tile

    # 2. Upstream gradients relative to the largest, so that no strip leaves a low precision's range.
    g_contrastive = tl.load(grad_terms_ptr + TERM_CONTRASTIVE)
    g_relational = tl.load(grad_terms_ptr + TERM_RELATIONAL)
    g_interactive = tl.load(grad_terms_ptr + TERM_INTERACTIVE)
    g_cross = tl.load(grad_terms_ptr + TERM_CROSS)
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

    # 3. Rows are averaged over whole_n, columns over whole_m: both relative to the smaller of the two.
    if weights_ptr is None:
        row_weight = tl.minimum(whole_n, whole_m).to(tl.float32) / whole_n
        col_weight = tl.minimum(whole_n, whole_m).to(tl.float32) / whole_m
    else:
        row_weight, col_weight = tl.load(weights_ptr), tl.load(weights_ptr + 1)
    scale = tl.load(logit_scale_ptr) * LOG2E
    teacher_factor = scale
    if USE_T:
        teacher_factor = tl.load(teacher_factor_ptr) * LOG2E
    shift = margin * scale
    d_logit_scale = tl.zeros([BLOCK_N], tl.float32)

    last_row, last_col = tl.minimum(first_row + rows, last), tl.minimum(first_col + cols, M)
    for row in range(first_row, last_row, BLOCK_N):
        offs_n = row + tl.arange(0, BLOCK_N)
        for col in tl.range(first_col, last_col, BLOCK_M, disable_licm=True):
            offs_m = col + tl.arange(0, BLOCK_M)

            # 4. The dot products of a tile and what is known about its rows and columns.
            b_s, b_a, b_b, b_t = dots(
                image_ptr, text_ptr, teacher_image_ptr, teacher_text_ptr, row, col, N, M, width,
                D, USE_S, USE_A, USE_B, USE_T, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            b_positive = positive_pairs(labels_ptr, text_labels_ptr, offs_n, offs_m, N, M, LABELS)
            # Products stay unscaled: σ's gradient is Σ ∂L/∂s u·v, also at σ = 0.
            row_inside, col_inside = offs_n < last, offs_m < M
            row_count = tl.load(
                row_stats_ptr + POSITIVES * N + offs_n, mask=row_inside, other=1.0
            )  # [BLOCK_N]
            if not ONE_WAY:
                col_count = tl.load(
                    col_stats_ptr + POSITIVES * M + offs_m, mask=col_inside, other=1.0
                )  # [BLOCK_M]
            d_row = tl.zeros([BLOCK_N], tl.float32)
            b_ds = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)

            # 5. Along rows: interactive and cross act on a, relational on s.
            if USE_T:
                lse = tl.load(row_stats_ptr + LSE_T * N + offs_n, mask=row_inside, other=0.0)
                b_p = row_weight * tl.exp2(b_t * teacher_factor - lse[:, None])
                if RELATIONAL:
                    b_ds -= g_relational * b_p
            if USE_A:
                b_da = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                if CROSS:
                    b_da -= g_cross * b_p
                lse = tl.load(row_stats_ptr + LSE_X * N + offs_n, mask=row_inside, other=0.0)
                b_da += g_crossed * row_weight * tl.exp2(b_a * scale - lse[:, None])
                if INTERACTIVE:
                    q_positive, q_negative = _target_weights(
                        row_count, whole_m, g_interactive * row_weight, 0.0, False
                    )
                    b_da -= tl.where(b_positive, q_positive[:, None], q_negative[:, None])
                if D_LOGIT_SCALE:
                    d_row += tl.sum(tl.where(col_inside[None, :], b_da * b_a, 0.0), 1)
                _store_strip(da_ptr, b_da, stride, row - first, offs_m, row_inside)

            # 6. Along columns: the same on b and s.
            if USE_T and not ONE_WAY:
                lse = tl.load(col_stats_ptr + LSE_T * M + offs_m, mask=col_inside, other=0.0)
                b_p = col_weight * tl.exp2(b_t * teacher_factor - lse[None, :])
                if RELATIONAL:
                    b_ds -= g_relational * b_p
            if USE_B:
                b_db = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                if CROSS:
                    b_db -= g_cross * b_p
                lse = tl.load(col_stats_ptr + LSE_X * M + offs_m, mask=col_inside, other=0.0)
                b_db += g_crossed * col_weight * tl.exp2(b_b * scale - lse[None, :])
                if INTERACTIVE:
                    q_positive, q_negative = _target_weights(
                        col_count, whole_n, g_interactive * col_weight, 0.0, False
                    )
                    b_db -= tl.where(b_positive, q_positive[None, :], q_negative[None, :])
                if D_LOGIT_SCALE:
                    d_row += tl.sum(tl.where(col_inside[None, :], b_db * b_b, 0.0), 1)
                _store_strip(db_ptr, b_db, stride, row - first, offs_m, row_inside)

            # 7. The student's softmaxes of the relational and the contrastive term, the latter's targets.
            if RELATIONAL:
                lse = tl.load(row_stats_ptr + LSE_S * N + offs_n, mask=row_inside, other=0.0)
                b_ds += g_relational * row_weight * tl.exp2(b_s * scale - lse[:, None])
                if not ONE_WAY:
                    lse = tl.load(col_stats_ptr + LSE_S * M + offs_m, mask=col_inside, other=0.0)
                    b_ds += g_relational * col_weight * tl.exp2(b_s * scale - lse[None, :])
            if CONTRASTIVE:
                b_z = b_s * scale
                if MARGIN:
                    b_z += tl.where(b_positive, 0.0, shift)
                lse = tl.load(row_stats_ptr + LSE_Z * N + offs_n, mask=row_inside, other=0.0)
                b_dz = g_contrastive * row_weight * tl.exp2(b_z - lse[:, None])
                if not ONE_WAY:
                    lse = tl.load(col_stats_ptr + LSE_Z * M + offs_m, mask=col_inside, other=0.0)
                    b_dz += g_contrastive * col_weight * tl.exp2(b_z - lse[None, :])
                q_positive, q_negative = _target_weights(
                    row_count, whole_m, g_contrastive * row_weight, smoothing, SMOOTHING
                )
                b_dz -= tl.where(b_positive, q_positive[:, None], q_negative[:, None])
                if not ONE_WAY:
                    q_positive, q_negative = _target_weights(
                        col_count, whole_n, g_contrastive * col_weight, smoothing, SMOOTHING
                    )
                    b_dz -= tl.where(b_positive, q_positive[None, :], q_negative[None, :])
                if D_LOGIT_SCALE and MARGIN:  # ∂z/∂σ = u·v + δ on negatives: here the δ
                    b_at_negatives = tl.where(b_positive, 0.0, b_dz)
                    d_row += margin * tl.sum(tl.where(col_inside[None, :], b_at_negatives, 0.0), 1)
                b_ds += b_dz
            if USE_S:
                if D_LOGIT_SCALE:
                    d_row += tl.sum(tl.where(col_inside[None, :], b_ds * b_s, 0.0), 1)
                _store_strip(ds_ptr, b_ds, stride, row - first, offs_m, row_inside)
            d_logit_scale += tl.where(row_inside, d_row, 0.0)

    if D_LOGIT_SCALE:
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(d_logit_scale_ptr + program, tl.sum(d_logit_scale, 0))
