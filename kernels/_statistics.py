"""Statistics of rows or columns over a set of logits: how two sets merge, and what follows from the whole.

The statistics of a row (or of a column) are log-sum-exps, means under a softmax, and plain sums. None of them
depends on the number that an implementation subtracts before it takes exponentials, so the statistics of disjoint
sets of logits merge exactly, whoever computed them.

====================  =====================================================================================
lse_s, _z, _t, _x     log-sum-exps to the base 2; x stands for a along rows, for b along columns
positive_s, _x        sums over the positives
total_s               sum over all pairs
positives             number of positives
gap_s, gap_x          means of t − s and of t − x under the teacher's softmax
mean_s, mean_t        diagnostics: mean of the logits under their own softmax
mass_s, mass_t        its mass on the positives
best_s, arg_s         largest logit and its index; likewise best_t, arg_t
right_s, right_t      1 where that index is a positive, else 0
====================  =====================================================================================

All logits are in base 2 (times log₂ e). A statistic is a vector with an entry for each row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .contrastive import TERMS, Forward, Options, Saved, Statistics

LN2 = math.log(2.0)

Side = dict[str, Tensor]  # the statistics of all rows, or of all columns, by name

_DIAGNOSTICS = ("mean", "mass", "best", "arg", "right")
# Under which softmax a mean is taken, by the name of the statistic.
SOFTMAX = {"gap_s": "t", "gap_x": "t", "mean_s": "s", "mean_t": "t", "mass_s": "s", "mass_t": "t"}


class Whole(NamedTuple):
    """The size of the logit matrix of which the features of a call make a rectangle."""

    rows: int
    cols: int


def statistic_names(options: Options, has_teacher: bool) -> tuple[str, ...]:
    """Return the names of the statistics that the options need, in the order in which they are packed.

    Those of the columns are the same, or none at all (``Options.one_way``).
    """
    measured = options.stats and has_teacher
    needed = {
        "lse_s": options.contrastive or options.relational or options.stats,
        "lse_z": options.contrastive and options.margin > 0,
        "lse_t": options.relational or options.cross or measured,
        "lse_x": options.crossed,
        "positive_s": options.contrastive,
        "positive_x": options.interactive,
        "total_s": options.contrastive and options.smoothing > 0,
        "positives": True,
        "gap_s": options.relational or measured,
        "gap_x": options.cross,
    }
    needed |= {f"{name}_s": options.stats for name in _DIAGNOSTICS}
    needed |= {f"{name}_t": measured for name in _DIAGNOSTICS}
    return tuple(name for name, wanted in needed.items() if wanted)


def pack(side: Side, names: tuple[str, ...], dtype: torch.dtype) -> Tensor:
    """Return the named statistics as a matrix [rows, len(names)]; an index keeps all of its bits."""
    return torch.stack([_as_number(side[name], name, dtype) for name in names], 1)


def unpack(packed: Tensor, names: tuple[str, ...]) -> Side:
    """Return the statistics of a matrix [..., rows, len(names)] by name, each [..., rows]."""
    columns = zip(names, packed.unbind(-1), strict=True)
    return {name: _as_index(x) if name.startswith("arg") else x for name, x in columns}


def _as_number(x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if name.startswith("arg") and dtype == torch.float32:  # which has 24 bits for an index
        return x.to(torch.int32).view(torch.float32)
    return x.to(dtype)


def _as_index(x: Tensor) -> Tensor:
    return (x.contiguous().view(torch.int32) if x.dtype == torch.float32 else x).long()


def nothing(rows: int, names: tuple[str, ...], like: Tensor) -> Side:
    """Return the statistics of ``rows`` rows over no logits at all: merging them changes nothing."""
    lowest = ("lse", "best")
    side = {name: like.new_full((rows,), -math.inf if name.startswith(lowest) else 0.0) for name in names}
    return {name: x.long() if name.startswith("arg") else x for name, x in side.items()}


def merge(parts: Side) -> Side:
    """Merge the statistics of the same rows over disjoint sets of logits, each [sets, rows], in the order given.

    The sums are taken in float64, so that a row is no less exact for having been divided. Among equal logits the
    lowest index is the largest.
    """
    parts = {name: part.double() if part.is_floating_point() else part for name, part in parts.items()}
    lse = {name: _log_sum_exp(part) for name, part in parts.items() if name.startswith("lse")}
    whole = dict(lse)
    for name, part in parts.items():
        if name in SOFTMAX:
            of = f"lse_{SOFTMAX[name]}"
            share = (parts[of] - lse[of].clamp(min=torch.finfo(part.dtype).min)).exp2()
            whole[name] = (share * part).sum(0)
        elif name.startswith(("positive", "total")):
            whole[name] = part.sum(0)
    for matrix in ("s", "t"):
        if f"best_{matrix}" in parts:
            best = parts[f"best_{matrix}"].amax(0)
            at = parts[f"arg_{matrix}"].masked_fill(
                parts[f"best_{matrix}"] != best, torch.iinfo(torch.int64).max
            )
            arg, place = at.min(0)
            right = parts[f"right_{matrix}"].gather(0, place[None])[0]
            whole |= {f"best_{matrix}": best, f"arg_{matrix}": arg, f"right_{matrix}": right}
    return whole


def _log_sum_exp(parts: Tensor) -> Tensor:
    """Return log2 Σ exp2 over the first dimension; −inf where there is nothing to add up."""
    top = parts.amax(0)
    reference = top.masked_fill(top == -math.inf, 0.0)
    return reference + (parts - reference).exp2().sum(0).log2()


# ---------------------------------------------------------------------------------------------------
# What follows from the statistics over all logits.


def target_weights(count: Tensor, others: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the target q of a positive and of a negative, for ``count`` positives among ``others``."""
    if smoothing == 0.0:
        return 1 / count, torch.zeros_like(count)
    q_negative = torch.where(count < others, smoothing / (others - count), 0.0)
    q_positive = (1 - q_negative * (others - count)) / count
    return q_positive.masked_fill(count < 0, 0.0), q_negative  # rows that are left out have no target


def counted(side: Side, options: Options) -> Tensor | int:
    """Return how many of these whole rows (or columns) count in the means."""
    count = side["positives"]
    return (count > 0).sum() if options.ignore else len(count)


def _total(values: Tensor, side: Side, options: Options) -> Tensor:
    """Return the sum over the rows that count in the means."""
    return torch.where(side["positives"] > 0, values, 0.0).sum() if options.ignore else values.sum()


def term_sums(side: Side, others: int, shift: Tensor, options: Options) -> Tensor:
    """Return the sum over the rows of what each adds to every term, [len(TERMS)].

    A term is half the mean over all rows of the matrix plus half the mean over all columns, or other weights' sum.

    Args:
        side: statistics over whole rows (or columns).
        others: length of a row.
        shift: σδ in base 2, what the margin adds to a negative.
        options: which terms are on; the others are 0.
    """
    count = side["positives"]
    sums = dict.fromkeys(TERMS, count.new_zeros(()))
    if options.contrastive:
        q_positive, q_negative = target_weights(count, others, options.smoothing)
        expected = (q_positive - q_negative) * side["positive_s"]
        if options.smoothing:
            expected += q_negative * (side["total_s"] + (others - count) * shift)
        sums["contrastive"] = _total(side.get("lse_z", side["lse_s"]) - expected, side, options)
    if options.relational:
        sums["relational"] = _total(_divergence(side, "s"), side, options)
    if options.interactive:
        sums["interactive"] = _total(side["lse_x"] - side["positive_x"] / count, side, options)
    if options.cross:
        sums["cross"] = _total(_divergence(side, "x"), side, options)
    return LN2 * torch.stack(list(sums.values()))


def _divergence(side: Side, matrix: str) -> Tensor:
    """Return KL(softmax t ‖ softmax of ``matrix``) in bits."""
    return side[f"gap_{matrix}"] - side["lse_t"] + side[f"lse_{matrix}"]


def final_statistics(side: Side, options: Options, weight: float) -> Tensor:
    """Return what the backward pass takes of whole rows (or columns) of this ``weight``, [len(Statistics), rows].

    A row without a positive has no target: NaN takes the place of the log-sum-exps that a target belongs to, and
    with them of the row's gradient. This is the only place that writes it. With ``options.ignore`` such a row is
    left out instead (:func:`leave_out`), and where no target is asked for it is a row like any other.
    """
    count = side["positives"]
    none = torch.zeros_like(count)
    lse_s = side.get("lse_s", none)
    lse_z, lse_t, lse_x = side.get("lse_z", lse_s), side.get("lse_t", none), side.get("lse_x", none)
    stats = torch.stack(Statistics(lse_z, lse_s, lse_t, lse_x, count))
    if options.ignore:
        return leave_out(stats)
    if not asks_for_targets(options, weight):
        return without_targets(stats)
    for name in ("lse_z", "lse_x"):
        stats[Statistics._fields.index(name)].masked_fill_(count == 0, math.nan)
    return stats


def asks_for_targets(options: Options, weight: float) -> bool:
    """Return whether a term that is on takes the positives of the rows (or columns) of this weight."""
    return weight > 0 and (options.contrastive or options.interactive)


def without_targets(stats: Tensor) -> Tensor:
    """Give rows without a positive one, in place, so that 0/0 reaches no gradient: nothing else is made of it."""
    stats[Statistics._fields.index("positives")].clamp_(min=1)
    return stats


def leave_out(stats: Tensor) -> Tensor:
    """Mark the rows without a positive, in place: infinite log-sum-exps and −∞ positives make every gradient 0."""
    none = stats[Statistics._fields.index("positives")] == 0
    stats.masked_fill_(none, math.inf)
    stats[Statistics._fields.index("positives")].masked_fill_(none, -math.inf)
    return stats


def side_weights(options: Options, rows: Tensor | int, cols: Tensor | int, like: Tensor) -> Tensor:
    """Return what a row and what a column weighs in a term, [2], when so many of them count."""
    weights = ((options.image_to_text, rows), (options.text_to_image, cols))
    # A side of weight 0 may have nothing that counts.
    return torch.stack(
        [like.new_ones(()) * weight / number if weight else like.new_zeros(()) for weight, number in weights]
    )


def weights_of(saved: Saved, options: Options, whole: Whole) -> Tensor | None:
    """Return the :func:`side_weights` of a matrix whose rows and columns are all there; None for ½/N, ½/M."""
    if options.halved:
        return None
    rows, cols = (
        (stats[-1] >= 0).sum() if options.ignore and len(stats) else size
        for stats, size in zip(saved, whole, strict=True)
    )
    return side_weights(options, rows, cols, saved.row_stats)


def diagnostic_sums(side: Side, options: Options) -> list[Tensor]:
    """Return the sums over the rows of the diagnostics: of the student, of the teacher, of the pair.

    In the order of ``contrastive.MODEL_DIAGNOSTICS`` and ``PAIR_DIAGNOSTICS``; without a teacher the first alone.
    """
    models = [matrix for matrix in ("s", "t") if f"mean_{matrix}" in side]
    sums = [_model_sums(side, matrix, options) for matrix in models]
    if len(models) == 2:
        agree = (side["arg_s"] == side["arg_t"]).to(side["lse_s"].dtype)
        of_pair = (agree, LN2 * _divergence(side, "s"))
        sums.append(torch.stack([_total(x, side, options) for x in of_pair]))
    return sums


def _model_sums(side: Side, matrix: str, options: Options) -> Tensor:
    lse = side[f"lse_{matrix}"]
    entropy = LN2 * (lse - side[f"mean_{matrix}"])
    confidence = (side[f"best_{matrix}"] - lse).exp2()
    right = side[f"right_{matrix}"].to(lse.dtype)
    values = (entropy, confidence, side[f"mass_{matrix}"], right)
    return torch.stack([_total(x, side, options) for x in values])


class Counted(NamedTuple):
    """How many rows and columns of a matrix the means run over."""

    rows: Tensor | int
    cols: Tensor | int


def shares(
    rows: Side, cols: Side, shift: Tensor, options: Options, whole: Whole, means: Counted
) -> tuple[Tensor, Tensor]:
    """Return what these whole rows and columns add to the terms and to the diagnostics of a matrix."""
    sides = (
        (options.image_to_text, rows, whole.cols, means.rows),
        (options.text_to_image, cols, whole.rows, means.cols),
    )
    terms = shift.new_zeros(len(TERMS), dtype=rows["positives"].dtype)
    for weight, side, others, number in sides:
        if weight:
            terms = terms + weight * term_sums(side, others, shift, options) / number
    if not options.stats:
        return terms, terms.new_empty(0)
    both = zip(diagnostic_sums(rows, options), diagnostic_sums(cols, options), strict=True)
    return terms, torch.cat([sums for row, col in both for sums in (row / means.rows, col / means.cols)])


def result(rows: Side, cols: Side, shift: Tensor, options: Options, whole: Whole) -> Forward:
    """Return terms, final statistics and diagnostics from the statistics of all rows and columns."""
    means = Counted(counted(rows, options), counted(cols, options) if cols else whole.cols)
    terms, diagnostics = shares(rows, cols, shift, options, whole, means)
    return Forward(terms, *finals(rows, cols, options, whole.cols), diagnostics)


def finals(rows: Side, cols: Side, options: Options, width: int) -> Saved:
    """Return the final statistics of whole rows and of ``width`` whole columns, of which nothing may be asked."""
    of_rows = final_statistics(rows, options, options.image_to_text)
    if not cols:
        return Saved(of_rows, of_rows.new_empty(0, width))
    return Saved(of_rows, final_statistics(cols, options, options.text_to_image))
