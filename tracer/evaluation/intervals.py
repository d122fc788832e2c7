"""95 % intervals by bootstrap over groups of pictures, alone and paired between two models.

Pictures of one class, camera or hand are alike, so that drawing them one by one makes an interval too narrow. A
draw takes as many groups as the set has, with replacement, and all pictures of each (the cluster bootstrap of
Davison and Hinkley 1997, section 3.8). Both models of a pair are measured on the same draws, so that what makes
a draw easy for both cancels. The bounds are the 2.5 % and 97.5 % quantiles of the draws.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tracer.evaluation.metrics import CALIBRATION_BINS, TOP, Predictions, bin_numbers

DRAWS = 1000
AT_ONCE = 20  # draws whose weights are in memory together
MOST = 20_000_000  # numbers of a table of groups by classes; a larger one is not made


class Interval(NamedTuple):
    """The bounds between which 95 % of the draws lie."""

    low: float
    high: float


@dataclass
class Sums:
    """A measure as a function of sums over pictures.

    Attributes:
        table: the sums of each group [G, K] float64.
        value: the measure, from sums [R, K] of R draws: [R].
    """

    table: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]

    def exact(self) -> float:
        """Return the measure of all groups together."""
        return float(self.value(self.table.sum(0, keepdims=True))[0])


def sums_of(
    measure: str, predictions: Predictions, groups: np.ndarray, regions: Sequence[str] = ()
) -> Sums | None:
    """Return a measure as sums over groups; None where its table would be too large.

    Args:
        measure: accuracy, top5, nll, ece, macro_f1 or worst_region.
        predictions: of N pictures.
        groups: number of each picture's group [N].
        regions: region of each picture, for worst_region.

    Raises:
        ValueError: the measure is none of these.
    """
    p, group = predictions, np.unique(groups, return_inverse=True)[1]
    count = int(group.max()) + 1
    if measure == "macro_f1":
        classes = int(max(p.truth.max(), p.predicted.max())) + 1
        if count * classes * 3 > MOST:
            return None
        true = _table(group, p.truth, classes)
        right = _table(group[p.correct], p.truth[p.correct], classes, count)
        both = true + _table(group, p.predicted, classes)
        return Sums(np.hstack([true, right, both]), _macro_f1)
    if measure == "worst_region":
        region, number = np.unique(np.array(regions), return_inverse=True)
        kept = np.array([name != "Other" for name in region])
        pictures = _table(group, number, len(region))[:, kept]
        right = _table(group[p.correct], number[p.correct], len(region), count)[:, kept]
        return Sums(np.hstack([pictures, right]), _worst)
    pictures = np.bincount(group, minlength=count)[:, None].astype(float)
    if measure == "ece":
        bins = bin_numbers(p.confidence, CALIBRATION_BINS)
        gap = p.correct - p.confidence.astype(np.float64)
        gaps = _table(group, bins, CALIBRATION_BINS, weights=gap)
        return Sums(np.hstack([pictures, gaps]), lambda x: np.abs(x[:, 1:]).sum(1) / x[:, 0])
    values = {"accuracy": p.correct, "top5": p.rank < TOP, "nll": p.nll}
    if measure not in values:
        raise ValueError(
            f"measure is '{measure}': it must be one of {', '.join(values)}, ece, macro_f1, worst_region"
        )
    return mean_over(values[measure], group)


def mean_over(values: np.ndarray, groups: np.ndarray, each: np.ndarray | None = None) -> Sums:
    """Return Σ values / Σ each as sums over groups; ``each`` [N] is 1 by default, which gives the mean."""
    group = np.unique(groups, return_inverse=True)[1]
    total = np.bincount(group, values.astype(np.float64))
    return Sums(np.stack([np.bincount(group, each), total], 1), lambda x: x[:, 1] / x[:, 0])


def draws(sums: Sums, name: str, count: int = DRAWS) -> np.ndarray:
    """Return the measure in each of so many draws [count]; NaN where it is not defined there.

    Args:
        sums: from :func:`sums_of`.
        name: of the set: the groups that are drawn depend on it and on their number alone.
        count: number of draws.
    """
    parts = [sums.value(part @ sums.table) for part in _weights(name, len(sums.table), count)]
    return np.concatenate(parts)


def interval(values: np.ndarray) -> Interval | None:
    """Return the interval of a measure from its draws; None where they say nothing: one group, or no value."""
    finite = values[np.isfinite(values)]
    if not len(finite) or len(finite) < len(values) / 2:
        return None
    low, high = np.quantile(finite, [0.025, 0.975])
    return Interval(float(low), float(high))


def _weights(name: str, groups: int, count: int) -> Iterator[np.ndarray]:
    """Yield how often each draw takes each group, [≤ AT_ONCE, groups] at a time."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    for start in range(0, count, AT_ONCE):
        chosen = random.integers(groups, size=(min(AT_ONCE, count - start), groups))
        yield np.stack([np.bincount(row, minlength=groups) for row in chosen]).astype(np.float64)


def _table(
    rows: np.ndarray, columns: np.ndarray, width: int, height: int = 0, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return how often each pair of row and column occurs [height, width], or the sum of its weights."""
    height = height or int(rows.max()) + 1
    flat = rows.astype(np.int64) * width + columns
    return np.bincount(flat, weights, height * width).reshape(height, width).astype(np.float64)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    true, right, both = np.split(sums, 3, axis=1)
    occurs = true > 0
    f1 = 2 * right / np.where(both > 0, both, 1)
    return (f1 * occurs).sum(1) / occurs.sum(1)


def _worst(sums: np.ndarray) -> np.ndarray:
    pictures, right = np.split(sums, 2, axis=1)
    return np.where(pictures > 0, right / np.where(pictures > 0, pictures, 1), np.inf).min(1)
