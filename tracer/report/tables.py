"""Rows of the tables that page and terminal show: values, changes, and which of them are clear."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tracer.report.results import Method, Results, Stat, best_of, clearly_differ


@dataclass(frozen=True)
class Cell:
    """One value: ``change`` is NaN in the row that is compared against, ``trend`` up or down only if clear."""

    stat: Stat
    best: bool
    change: float
    trend: str  # "up" (better), "down" (worse) or ""


@dataclass(frozen=True)
class Row:
    """A method and its cells, in the order of the results' columns."""

    method: Method
    cells: list[Cell]


def table_rows(
    results: Results, measure: str, *, teacher: bool = False, full: Method | None = None
) -> list[Row]:
    """Return the rows of a table, without the methods for which nothing was measured.

    Args:
        measure: accuracy or ece; of the latter the lowest is best.
        teacher: take the scores of the methods' teachers instead of their own.
        full: a method with variants; then the rows are this method and its variants, and changes are against
            it. Otherwise the rows are the main methods, and changes are against the baseline.
    """
    lower = measure == "ece"
    base = full or results.baseline
    methods = [full, *results.variants[full]] if full else results.main
    stats = {m: [m.stat(column, measure, teacher) for column in results.columns] for m in methods}
    stats = {m: row for m, row in stats.items() if any(math.isfinite(stat.mean) for stat in row)}
    best = [best_of(column, lower) for column in zip(*stats.values(), strict=True)]
    starts = [base.stat(column, measure) for column in results.columns] if base else []
    rows = []
    for place, (method, row) in enumerate(stats.items()):
        compared = [None] * len(row) if base is None or method is base else starts
        cells = [
            _cell(stat, start, best[c] == place, lower, _paired(method, results, c, measure, teacher, full))
            for c, (stat, start) in enumerate(zip(row, compared, strict=True))
        ]
        rows.append(Row(method, cells))
    return rows


def _paired(
    method: Method, results: Results, column: int, measure: str, teacher: bool, full: Method | None
) -> float:
    """Return half the 95 % interval of a change that was measured on the same pictures: a gain above the start."""
    return method.gain_error(results.columns[column], measure, teacher) if full is None else math.nan


def _cell(stat: Stat, start: Stat | None, best: bool, lower: bool, paired_error: float) -> Cell:
    if start is None:
        return Cell(stat, best, math.nan, "")
    change = stat.mean - start.mean
    better = (change < 0) == lower
    trend = ("up" if better else "down") if clearly_differ(stat, start, paired_error) else ""
    return Cell(stat, best, change, trend)
