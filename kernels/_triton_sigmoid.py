"""The Triton kernel of the sigmoid form: one visit of each tile, for the terms and the gradients of its logits.

A program walks over its rectangle, adds up in registers what its pairs contribute, and leaves one number for each
output: no atomics, so that two runs agree bit for bit. The gradients of the logits go, in the inputs' dtype, to a
strip of rows, from which the launcher's matrix products take the gradients of the features.

Logits are in base 2 (times log₂e): the one exponential of a pair, 2^−|x|, serves its softplus and its sigmoid.
"""

from __future__ import annotations

from ._triton import tl, triton
from ._triton_backward import _store_strip
from ._triton_tile import (
    LN2,
    LOG2E,
    NUMBERS,
    SMALL_OPERANDS,
    TERM_CONTRASTIVE,
    TERM_RELATIONAL,
    dots,
    positive_pairs,
)  # fmt: skip

# Places of a program's outputs: the sums of its pairs, and its share of the scalars' gradients.
PAIR_OUTPUTS = ("contrastive", "relational", "logit_scale", "logit_bias")
SUM_CONTRASTIVE, SUM_RELATIONAL, D_LOGIT_SCALE, D_LOGIT_BIAS = (
    tl.constexpr(i) for i in range(len(PAIR_OUTPUTS))
)


@triton.jit
def _log1p(b_e):
    """Return log(1 + e) for e in [0, 1], within 2 ulp: 1 + e, rounded, would lose the bits of a small e.

    e times the polynomial of degree 9 that interpolates log(1 + e)/e at the Chebyshev nodes.
    """
    b_p = -3.176057008524613e-3 * b_e + 1.954252721422867e-2
    b_p = b_p * b_e - 5.637361273775700e-2
    b_p = b_p * b_e + 1.054362378549976e-1
    b_p = b_p * b_e - 1.526966706811639e-1
    b_p = b_p * b_e + 1.966327425486589e-1
    b_p = b_p * b_e - 2.495161626236857e-1
    b_p = b_p * b_e + 3.332971049886048e-1
    b_p = b_p * b_e - 4.999989264806038e-1
    b_p = b_p * b_e + 9.999999946562914e-1
    return b_e * b_p


@triton.jit
def _pair(b_x):
    """Return softplus and sigmoid of logits in base 2, exact for any of them."""
    b_e = tl.exp2(-tl.abs(b_x))
    b_softplus = tl.maximum(b_x, 0.0) * LN2 + _log1p(b_e)
    return b_softplus, tl.where(b_x >= 0, 1.0, b_e) / (1.0 + b_e)


@triton.jit(do_not_specialize=[*NUMBERS, "gain"], do_not_specialize_on_alignment=SMALL_OPERANDS)
def sigmoid_kernel(
    upstream_ptr,  # [len(TERMS)], or None for ones
    image_ptr, text_ptr, logit_scale_ptr,  # [N, D], [M, D], []
    teacher_image_ptr, teacher_text_ptr, teacher_factor_ptr,  # [N, D], [M, D], σ'/T [], or None
    labels_ptr, text_labels_ptr,  # [N], [M], or None
    logit_bias_ptr, teacher_logit_bias_ptr,  # [], [] or None
    ds_ptr, stride,  # strip [last − first, M rounded up to whole tiles] with row stride, or None
    outputs_ptr,  # [grid 0, grid 1, len(PAIR_OUTPUTS)]
    margin, gain, N, M, width,  # gain: of the gradients, for the range of their dtype
    first, last, rows, cols,  # the strip's rows; size of a rectangle
    D: tl.constexpr, LABELS: tl.constexpr, MARGIN: tl.constexpr, RELATIONAL: tl.constexpr, SUMS: tl.constexpr,
    GRADIENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # 1. The rectangle of this program within the strip.
    first_row = first + tl.program_id(0) * rows
    first_col = tl.program_id(1) * (cols // BLOCK_M) * BLOCK_M  # so the compiler knows that it starts a tile
    last_row, last_col = tl.minimum(first_row + rows, last), tl.minimum(first_col + cols, M)

    # 2. Upstream gradients relative to the largest; scales and biases into base 2.
    g_contrastive, g_relational = gain, gain
    if upstream_ptr is not None:
        g_contrastive = tl.load(upstream_ptr + TERM_CONTRASTIVE)
        g_relational = tl.load(upstream_ptr + TERM_RELATIONAL) if RELATIONAL else 0.0
        largest = tl.maximum(tl.abs(g_contrastive), tl.abs(g_relational))
        largest = tl.where(largest == 0, 1.0, largest)
        g_contrastive *= gain / largest
        g_relational *= gain / largest
    scale, bias = tl.load(logit_scale_ptr) * LOG2E, tl.load(logit_bias_ptr) * LOG2E
    shift = margin * scale
    if RELATIONAL:
        teacher_factor = tl.load(teacher_factor_ptr) * LOG2E
        teacher_bias = tl.load(teacher_logit_bias_ptr) * LOG2E
    contrastive, relational = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    d_scale, d_bias = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)

    for row in range(first_row, last_row, BLOCK_N):
        offs_n = row + tl.arange(0, BLOCK_N)
        for col in tl.range(first_col, last_col, BLOCK_M, disable_licm=True):
            offs_m = col + tl.arange(0, BLOCK_M)

            # 3. The dot products and the positives of a tile. Products stay unscaled: σ's gradient is Σ ∂L/∂s u·v.
            b_s, _, _, b_t = dots(
                image_ptr, text_ptr, teacher_image_ptr, teacher_text_ptr, row, col, N, M, width,
                D, True, False, False, RELATIONAL, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            b_positive = positive_pairs(labels_ptr, text_labels_ptr, offs_n, offs_m, N, M, LABELS)
            row_inside = offs_n < last
            b_inside = row_inside[:, None] & (offs_m < M)[None, :]
            b_x = b_s * scale + bias
            b_ds = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)

            # 4. The divergence of a pair's two probabilities: p' (t − s) + softplus s − softplus t.
            if RELATIONAL:
                b_y = b_t * teacher_factor + teacher_bias
                b_softplus, b_q = _pair(b_y)
                b_kl = b_q * (b_y - b_x) * LN2 - b_softplus
                b_softplus, b_p = _pair(b_x)
                if SUMS:
                    relational += tl.sum(tl.where(b_inside, b_kl + b_softplus, 0.0), 1)
                b_ds = g_relational * (b_p - b_q)

            # 5. softplus of −x at the positives, of x with its margin elsewhere.
            if MARGIN:
                b_x += shift
                b_x = tl.where(b_positive, shift - b_x, b_x)
            else:
                b_x = tl.where(b_positive, -b_x, b_x)
            b_softplus, b_p = _pair(b_x)
            if SUMS:
                contrastive += tl.sum(tl.where(b_inside, b_softplus, 0.0), 1)

            # 6. The gradients of the logits.
            if GRADIENTS:
                b_dz = g_contrastive * tl.where(b_positive, -b_p, b_p)
                b_ds = tl.where(b_inside, b_ds + b_dz, 0.0)
                d_bias += tl.sum(b_ds, 1)
                d_scale += tl.sum(b_ds * b_s, 1)
                if MARGIN:
                    d_scale += margin * tl.sum(tl.where(b_positive | ~b_inside, 0.0, b_dz), 1)
                _store_strip(ds_ptr, b_ds, stride, row - first, offs_m, row_inside)

    # 7. One number of each kind.
    outputs_ptr += (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 4
    if SUMS:
        tl.store(outputs_ptr + SUM_CONTRASTIVE, tl.sum(contrastive, 0))
        tl.store(outputs_ptr + SUM_RELATIONAL, tl.sum(relational, 0))
    if GRADIENTS:
        tl.store(outputs_ptr + D_LOGIT_SCALE, tl.sum(d_scale, 0))
        tl.store(outputs_ptr + D_LOGIT_BIAS, tl.sum(d_bias, 0))
