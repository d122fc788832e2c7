"""Every partial statistic of the walk, row by row and column by column, in float64: merged, and by definition.

A wrong statistic of one column in thousands hardly moves a term, a norm or a mean. These functions compare each on
its own.
"""

from __future__ import annotations

import kernel_calls
import torch
from kernel_calls import SMALL, to_device
from torch import Tensor
from triton_interpreter import DEVICE

from tracer.kernels import _triton_tile as place
from tracer.kernels._triton import gpu, planning_for
from tracer.kernels.contrastive import Inputs, Options, teacher_factor

LOG2E = place.LOG2E.value
# Sums weighted by the exponentials of their model, by name: statistic, and the sum of these exponentials.
_WEIGHTED = {
    "s entropy": (place.S_SELF, place.S_SUM), "s mass": (place.S_MASS, place.S_SUM),
    "t entropy": (place.T_SELF, place.T_SUM), "t mass": (place.T_MASS, place.T_SUM),
    "t minus s": (place.T_MINUS_S, place.T_SUM), "t minus x": (place.T_MINUS_X, place.T_SUM),
}  # fmt: skip
_LOG_SUM_EXPS = {
    "z": (place.Z_MAX, place.Z_SUM), "s": (place.S_MAX, place.S_SUM),
    "t": (place.T_MAX, place.T_SUM), "x": (place.X_MAX, place.X_SUM),
}  # fmt: skip
_PLAIN = {
    "z positive": place.Z_POSITIVE, "z negative": place.Z_NEGATIVE, "x positive": place.X_POSITIVE,
    "count": place.COUNT,
}  # fmt: skip
_ARGMAX = {"s": (place.S_MAX, place.S_ARG), "t": (place.T_MAX, place.T_ARG)}
_MAXIMUM = {sum_: top for top, sum_ in _LOG_SUM_EXPS.values()}

Side = dict[str, Tensor]  # a statistic by name, one number for each row or column


def by_definition(inputs: Inputs, options: Options) -> tuple[Side, Side]:
    """Return the statistics of the rows and of the columns; logits are in base 2, as the kernels have them."""
    scale = inputs.logit_scale * LOG2E
    factor = teacher_factor(inputs, options)
    s, a = inputs.image @ inputs.text.T * scale, inputs.image @ inputs.teacher_text.T * scale
    b = inputs.teacher_image @ inputs.text.T * scale
    t = inputs.teacher_image @ inputs.teacher_text.T * (factor * LOG2E)
    positive = inputs.labels[:, None] == inputs.text_labels[None, :]
    rows = _side(s, t, a, positive, options.margin * scale)
    return rows, _side(s.T, t.T, b.T, positive.T, options.margin * scale)


def _side(s: Tensor, t: Tensor, x: Tensor, positive: Tensor, shift: Tensor) -> Side:
    ln2, zero = place.LN2.value, torch.zeros_like(s)
    p, q = (s * ln2).softmax(1), (t * ln2).softmax(1)
    z = s + torch.where(positive, zero, shift)
    logs = {name: (y * ln2).logsumexp(1) / ln2 for name, y in (("z", z), ("s", s), ("t", t), ("x", x))}
    return logs | {
        "z positive": torch.where(positive, s, zero).sum(1),
        "z negative": torch.where(positive, zero, s).sum(1),
        "x positive": torch.where(positive, x, zero).sum(1),
        "count": positive.sum(1).to(s),
        "s entropy": (p * s).sum(1),
        "s mass": torch.where(positive, p, zero).sum(1),
        "t entropy": (q * t).sum(1),
        "t mass": torch.where(positive, q, zero).sum(1),
        "t minus s": (q * (t - s)).sum(1),
        "t minus x": (q * (t - x)).sum(1),
        "argmax s": s.argmax(1).to(s),
        "argmax t": t.argmax(1).to(s),
    }


def by_kernels(inputs: Inputs, options: Options, *, multiprocessors: int, tile=SMALL) -> tuple[Side, Side]:
    """Return what one launch of the forward kernel leaves in the scratch, its programs' parts merged in float64.

    Args:
        inputs, options: in float64 on the CPU, with a teacher and labels; all terms, smoothing and statistics.
        multiprocessors: of the GPU that the grid is for: few make programs of many tiles.
        tile: of the walk.
    """
    launchers, moved = kernel_calls.contrastive_triton, to_device(inputs)
    with planning_for(gpu(DEVICE).architecture, multiprocessors):
        operands = launchers._operands(moved, options)
        partials = launchers._scratch(operands, options, tile)
        launchers.walk(operands, options, partials)
    sizes = len(inputs.image), len(inputs.text)
    rows, cols = (
        _merged(scratch, partials.slots, size)
        for scratch, size in zip((partials.rows, partials.cols), sizes, strict=True)
    )
    return rows, cols


def _merged(scratch: Tensor, slots: tuple[int, ...], size: int) -> Side:
    """Merge scratch [groups, blocks, K, block], one part of the other side in each group."""

    def parts(statistic: place.tl.constexpr) -> Tensor:  # [groups, size]
        return scratch[:, :, slots[statistic.value]].flatten(1)[:, :size].double().cpu()

    def total(sum_: place.tl.constexpr, weights: place.tl.constexpr) -> Tensor:
        top = parts(_MAXIMUM[weights])
        return (parts(sum_) * (top - top.amax(0)).exp2()).sum(0)

    side = {
        name: parts(top).amax(0) + total(sum_, sum_).log2() for name, (top, sum_) in _LOG_SUM_EXPS.items()
    }
    side |= {name: total(x, sum_) / total(sum_, sum_) for name, (x, sum_) in _WEIGHTED.items()}
    side |= {name: parts(x).sum(0) for name, x in _PLAIN.items()}
    for name, (top, index) in _ARGMAX.items():
        first = parts(top).argmax(0, keepdim=True)
        bits = parts(index).float().view(torch.int32)  # the scratch holds an index as the bits of a float
        side[f"argmax {name}"] = bits.gather(0, first)[0].double()
    return side


def assert_right(inputs: Inputs, options: Options, *, slack: float = 2e-5, **how) -> None:
    """Assert that the largest error of each statistic, of rows and of columns, is within ``slack``."""
    sides = zip(
        ("row", "column"), by_kernels(inputs, options, **how), by_definition(inputs, options), strict=True
    )
    for side, got, want in sides:
        assert got.keys() == want.keys()
        for name, truth in want.items():
            error = (got[name] - truth).abs() / truth.abs().clamp(min=1)
            worst = int(error.nan_to_num(torch.inf).argmax())
            wrong = f"{name} of {side} {worst}: {got[name][worst]}, by definition {truth[worst]}"
            assert error[worst] < slack, wrong
