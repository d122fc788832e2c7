"""Rows of the tables that page and terminal show: values, changes, and which of them are clear."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tracer.report.results import (
    Method,
    Pair,
    Results,
    Scores,
    Stat,
    best_of,
    clearly_differ,
    number,
    scores_of,
)


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


@dataclass(frozen=True)
class ClassChange:
    """How many of the pictures of a class a method has right, and the baseline, over all its seeds and sets."""

    name: str
    pictures: float
    before: float
    after: float


def class_changes(
    results: Results, most: int = 5
) -> list[tuple[Method, list[ClassChange], list[ClassChange]]]:
    """Return for each trained method the classes whose accuracy under shift rose and fell most, with the
    baseline's.

    The classes of a set without shifted ones are those of the sets in distribution. Accuracies are fractions of
    the pictures of all these sets together, the means over the seeds.

    Args:
        most: classes of each kind.
    """
    column, base = results.under_shift or results.in_distribution, results.baseline
    if base is None:
        return []
    start = _right_by_class(base, column.domains)
    table = []
    for method in results.main:
        end = _right_by_class(method, column.domains) if method is not base else {}
        changes = [
            ClassChange(name, pictures, start[name][1], right)
            for name, (pictures, right) in end.items()
            if name in start
        ]
        changes.sort(key=lambda c: (c.after - c.before, c.name))
        falls = [c for c in changes[:most] if c.after < c.before]
        rises = [c for c in changes[::-1][:most] if c.after > c.before]
        if changes:
            table.append((method, rises, falls))
    return table


def _right_by_class(method: Method, domains: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Return {class: (pictures of all these sets, share of them that is right)}, the mean over the runs."""
    seeds = []
    for run in method.runs:
        total: dict[str, tuple[float, float]] = {}
        for domain in domains:
            for name, (pictures, right) in run.by_class.get(domain, {}).items():
                before = total.get(name, (0.0, 0.0))
                total[name] = before[0] + pictures, before[1] + right
        seeds.append(total)
    names = [name for name in seeds[0] if all(name in total for total in seeds)] if seeds else []
    return {
        name: (seeds[0][name][0], sum(total[name][1] / total[name][0] for total in seeds) / len(seeds))
        for name in names
    }


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


@dataclass(frozen=True)
class Mixture:
    """A soup of a method's trials, or the trial that was chosen: fractions, NaN where nothing was measured."""

    method: Method
    kind: str
    validation: float
    scores: list[tuple[float, float]]  # accuracy and ece in each column of the summary
    changes: list[Pair | None]  # of the accuracy in each of them, against the trial that was chosen


MIXTURES = {"uniform": "uniform", "greedy": "greedy", "fisher": "Fisher-weighted"}


def mixtures(results: Results) -> list[Mixture]:
    """Return for each method whose trials were mixed the chosen trial and its soups."""
    columns = [column for column in (results.in_distribution, results.under_shift) if column]
    rows = []
    for method in results.methods:
        choice, soups = results.choices.get(method.key), results.soups.get(method.key)
        if not choice or not soups or not method.runs:
            continue
        trials = {trial["run"]: number(trial["validation"]) for trial in choice["trials"]}
        trials = {run: score for run, score in trials.items() if math.isfinite(score)}  # the others diverged
        chosen = next(t for t in choice["trials"] if t["point"] == choice["chosen"])
        of_chosen = f"chosen of {len(trials)} trials", trials[chosen["run"]], method.runs[0].eval
        tested: list[tuple[str, float, Scores, list[Pair]]] = [(*of_chosen, [])]
        for kind, soup in soups.items():
            of = f", {len(soup['trials'])} of {len(trials)} trials" if "trials" in soup else ""
            name = MIXTURES.get(kind, kind) + of
            pairs = [Pair(**pair) for pair in soup.get("pairs", [])]
            tested.append((name, number(soup["validation"]), scores_of(soup["eval"]), pairs))
        for name, validation, scores, pairs in tested:
            read = [(c.read(scores, "accuracy"), c.read(scores, "ece")) for c in columns]
            gains = {pair.column: pair for pair in pairs if pair.measure == "accuracy"}
            rows.append(Mixture(method, name, validation, read, [gains.get(c.key) for c in columns]))
    return rows
