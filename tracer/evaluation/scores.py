"""What a model scores on a set, with intervals, and how it differs from another model on the same pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from tracer.evaluation.intervals import Interval, Sums, draws, interval, mean_over, sums_of
from tracer.evaluation.metrics import (
    Predictions,
    classification,
    per_class,
    reliability,
    worst_region,
)
from tracer.evaluation.retrieval import RECALLS, Ranks
from tracer.evaluation.sets import EvaluationSet

# A model's results on one set: every measure as a number, the bounds of its interval under ``measure_low`` and
# ``measure_high``, the number of pictures, of a published set its name and its true number of pictures, and
# perhaps gains above another model; see add_gains. Two details are no numbers: ``reliability``, the bins of the
# calibration error, and ``by_class``, {class: [pictures, right ones]}.
Score = dict[str, Any]
Scores = dict[str, Score]  # by name of the evaluation set

DETAILS = ("reliability", "by_class")
MEASURES = ("accuracy", "top5", "nll", "macro_f1", "worst_region", "ece")
RETRIEVAL = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in RECALLS)


class Scored(NamedTuple):
    """A score, with what it was made of: the set, and what was kept of each picture."""

    score: Score
    set: EvaluationSet
    kept: Predictions | Ranks

    def sums(self, measure: str) -> Sums | None:
        """Return a measure as sums over the set's groups; None where it is not measured."""
        groups = self.set.groups
        if isinstance(self.kept, Predictions):
            if measure not in self.score or measure not in MEASURES:
                return None
            return sums_of(measure, self.kept, groups, self.set.regions)
        way, _, k = measure.rpartition("_r")
        if measure not in RETRIEVAL:
            return None
        if way == "image_to_text":
            return mean_over(self.kept.image < int(k), groups)
        return mean_over(self.kept.text < int(k), groups[self.kept.owner])


class Difference(NamedTuple):
    """A measure of one model minus that of another on the same pictures, with its paired 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval does not hold 0."""
        return self.low > 0 or self.high < 0


def score_classes(each: EvaluationSet, predictions: Predictions) -> Scored:
    """Return the score of predictions on a set of classes."""
    score: Score = classification(predictions, len(each.class_ids))
    names = each.class_ids
    score["by_class"] = {names[n]: [*counts] for n, counts in per_class(predictions).items()}
    score["reliability"] = reliability(predictions)
    if each.regions:
        score["worst"], score["worst_region"] = worst_region(predictions.correct, each.regions)
    return _with_intervals(Scored(score | _about(each), each, predictions), MEASURES)


def score_retrieval(each: EvaluationSet, ranks: Ranks) -> Scored:
    """Return the score of ranks on a set of captions."""
    score: Score = ranks.recalls() | {"captions": len(ranks.owner)}
    return _with_intervals(Scored(score | _about(each), each, ranks), RETRIEVAL)


def _about(each: EvaluationSet) -> Score:
    about: Score = {"pictures": len(each.index), "groups": len(np.unique(each.groups))}
    if each.layout:
        about["set"] = each.layout
    if each.expected is not None:
        about["expected"] = each.expected
    return about | {"measure": each.measure}


def _with_intervals(scored: Scored, measures: Sequence[str]) -> Scored:
    for measure in measures:
        sums = scored.sums(measure)
        bounds = interval(draws(sums, scored.set.name)) if sums and scored.score["groups"] > 1 else None
        if bounds:
            scored.score[f"{measure}_low"], scored.score[f"{measure}_high"] = bounds
    return scored


def difference(a: Sequence[Scored], b: Sequence[Scored], measure: str) -> Difference | None:
    """Return the mean over several sets of a measure of model ``a`` minus that of model ``b``.

    Args:
        a, b: scores of both models on the same sets, in the same order.
        measure: one that every set has.

    Returns:
        None where a set lacks the measure, has another number of groups for one model, or gives no interval.
    """
    values, drawn = [], []
    for one, other in zip(a, b, strict=True):
        sums = one.sums(measure), other.sums(measure)
        if sums[0] is None or sums[1] is None or len(sums[0].table) != len(sums[1].table):
            return None
        values.append(sums[0].exact() - sums[1].exact())
        drawn.append(draws(sums[0], one.set.name) - draws(sums[1], one.set.name))
    bounds: Interval | None = interval(np.mean(drawn, axis=0))
    return Difference(float(np.mean(values)), *bounds) if bounds else None


def paired(a: Sequence[Scored], b: Sequence[Scored], measure: str) -> Difference | None:
    """Return the difference of two models with the wider 95 % interval of two: over groups, and over pictures.

    With two classes the first alone would call the loss of one picture in each a sure fall. A set of one group,
    from which nothing can be drawn, counts by its pictures in both.

    Args:
        a, b, measure: see :func:`difference`.
    """

    def by_group(side: Sequence[Scored]) -> list[Scored]:
        return [each if each.score["groups"] > 1 else _by_picture(each) for each in side]

    def by_picture(side: Sequence[Scored]) -> list[Scored]:
        return [_by_picture(each) for each in side]

    drawn = [difference(sides(a), sides(b), measure) for sides in (by_group, by_picture)]
    known = [each for each in drawn if each is not None and math.isfinite(each.value)]
    if not known:
        return None
    return Difference(known[0].value, min(each.low for each in known), max(each.high for each in known))


def _by_picture(scored: Scored) -> Scored:
    return scored._replace(set=replace(scored.set, groups=np.arange(len(scored.set.index))))


def add_gains(now: Mapping[str, Scored], before: Mapping[str, Scored]) -> None:
    """Add to each score its gain above another model on the same pictures, with a paired 95 % interval.

    A score gets ``accuracy_gain``, ``accuracy_gain_low`` and ``accuracy_gain_high``, and the same of the measure
    by which its set is published; see :func:`paired`.
    """
    for name, scored in now.items():
        for measure in {"accuracy", scored.score["measure"]} if name in before else ():
            gain = paired([scored], [before[name]], measure)
            if gain is not None:
                scored.score[f"{measure}_gain"] = gain.value
                scored.score[f"{measure}_gain_low"] = gain.low
                scored.score[f"{measure}_gain_high"] = gain.high


def incomplete(score: Score) -> str:
    """Return how many pictures of a published set are there, where that is not all of them; else nothing."""
    expected = score.get("expected")
    if expected is None or expected == score["pictures"]:
        return ""
    return f"{score['pictures']:,} of {expected:,} pictures"


def numbers_alone(scores: Scores) -> Scores:
    """Return scores without the details of their bins and classes."""
    return {of: {k: v for k, v in score.items() if k not in DETAILS} for of, score in scores.items()}


def finite(score: Score) -> Score:
    """Return a score with None in place of numbers that JSON has no word for."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in score.items()}
