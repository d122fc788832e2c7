"""Results arranged for reading: statistics over seeds, columns and methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

NBSP = "\N{NO-BREAK SPACE}"

BLOCKS = 100  # most points of a curve: longer logs are averaged over blocks of steps


@dataclass(frozen=True)
class Stat:
    """Mean over seeds, and the spread: the sample standard deviation, None if it cannot be known."""

    mean: float
    spread: float | None
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Iterable[float], exact: bool = False) -> Stat:
        """Over the finite ``values``; ``exact`` says that a single value has no randomness in it."""
        finite = tuple(v for v in values if math.isfinite(v))
        if not finite:
            return cls(math.nan, None)
        if len(finite) == 1:
            return cls(finite[0], 0.0 if exact else None, finite)
        return cls(statistics.fmean(finite), statistics.stdev(finite), finite)


def clearly_differ(a: Stat, b: Stat) -> bool:
    """Whether the ranges mean ± spread are known and do not overlap."""
    if a.spread is None or b.spread is None:
        return False
    return abs(a.mean - b.mean) > a.spread + b.spread


@dataclass(frozen=True)
class Column:
    """A column of the tables: the mean over ``domains`` of a measured value."""

    key: str
    group: str
    label: str
    detail: str
    domains: tuple[str, ...]

    def read(self, evaluation: dict[str, Any] | None, what: str) -> float:
        """The value in one evaluation, a fraction; NaN if a domain is missing or not a number."""
        cells = [number(((evaluation or {}).get(d) or {}).get(what)) for d in self.domains]
        return statistics.fmean(cells) if cells else math.nan


@dataclass(frozen=True, eq=False)
class Method:
    """A row of the tables."""

    index: int
    key: str
    name: str
    note: str
    runs: list[dict[str, Any]]
    variant_of: str | None = None  # of an ablation: in a table of their own, in that method's colour

    @property
    def trained(self) -> bool:
        """Whether any run has a seed or a log; otherwise its single result has no randomness."""
        return any(run.get("seed") is not None or run.get("log") for run in self.runs)

    def stat(self, column: Column, what: str = "accuracy", of: str = "eval") -> Stat:
        """Mean and spread over the runs. ``of``: eval for the model itself, teacher_eval for its teacher."""
        return Stat.of((column.read(run.get(of), what) for run in self.runs), exact=not self.trained)


@dataclass(frozen=True)
class Summary:
    """The results, arranged for reading."""

    methods: list[Method]
    columns: list[Column]
    baseline: Method | None  # zero-shot
    plain: Method | None  # fine-tuned without any regularisation
    home: Column  # in distribution
    away: Column | None  # mean over the shifted domains

    @property
    def main(self) -> list[Method]:
        """The methods that are compared with each other: without the variants of an ablation."""
        return [m for m in self.methods if m.variant_of is None]

    @property
    def parts(self) -> dict[Method, list[Method]]:
        """Method → its variants, each with a part switched off, for methods that have any."""
        variants = {full: [m for m in self.methods if m.variant_of == full.key] for full in self.main}
        return {full: some for full, some in variants.items() if some}


def number(value: Any) -> float:
    """``value`` as a float; NaN for None and for anything that is not a number."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def summarise(results: dict[str, Any]) -> Summary:
    """Arrange ``results``: which columns there are, which method is the baseline and which the plain one.

    Raises:
        ValueError: there is no domain or no method to report on.
    """
    domains, listed = results.get("domains") or [], results.get("methods") or []
    if not domains or not listed:
        raise ValueError("results hold no domains or no methods; there is nothing to report")
    place = {str(m["key"]): i for i, m in enumerate(listed)}
    methods = []
    for i, m in enumerate(listed):
        key, of = str(m["key"]), m.get("variant_of")
        name, note = str(m.get("name") or key), str(m.get("note") or "")
        methods.append(Method(place.get(of, i), key, name, note, m.get("runs") or [], of))
    kinds: dict[str, list[dict[str, Any]]] = {}
    for domain in domains:
        kinds.setdefault(str(domain.get("kind", "shifted")), []).append(domain)
    at_home = kinds.get("in-distribution") or domains[:1]
    shifted = [d for d in kinds.get("shifted", []) if d not in at_home]

    def size(domain: dict[str, Any]) -> str:
        parts = [f"{domain[k]}{NBSP}{k}" for k in ("pictures", "classes") if domain.get(k) is not None]
        return ", ".join(parts)

    def one(domain: dict[str, Any], group: str) -> Column:
        name = str(domain["name"])
        return Column(name, group, name, size(domain), (name,))

    def mean(some: list[dict[str, Any]], key: str, group: str, label: str) -> Column:
        names = tuple(str(d["name"]) for d in some)
        detail = f"mean of {len(some)}" if len(some) > 1 else names[0]
        return Column(key, group, label, detail, names)

    home = mean(at_home, "in-distribution", "Summary", "In distribution")
    away = mean(shifted, "shifted", "Summary", "Under shift") if shifted else None
    columns = [home] + ([away] if away else [])
    if len(at_home) > 1:
        columns += [one(d, "In distribution") for d in at_home]
    for kind, some in kinds.items():
        rest = [d for d in some if d not in at_home]
        if kind != "shifted" or len(shifted) > 1:
            columns += [one(d, kind.capitalize()) for d in rest]

    untrained = [m for m in methods if not m.trained]
    trained = [m for m in methods if m.trained]
    named = {m.key: m for m in methods}
    return Summary(
        methods,
        columns,
        baseline=named.get("zero-shot") or next(iter(untrained), None),
        plain=named.get("flyp") or next(iter(trained), None),
        home=home,
        away=away,
    )


def best_of(stats: Sequence[Stat], lower_is_better: bool = False) -> int | None:
    """Index of the best mean, if it differs clearly from every other; else None."""
    known = [i for i, s in enumerate(stats) if math.isfinite(s.mean)]
    if len(known) < 2:
        return None
    best = (min if lower_is_better else max)(known, key=lambda i: stats[i].mean)
    return best if all(clearly_differ(stats[best], stats[i]) for i in known if i != best) else None


def seeds_of(summary: Summary) -> int:
    """The largest number of runs with a seed that a method has."""
    return max(sum(run.get("seed") is not None for run in m.runs) for m in summary.methods)


@dataclass(frozen=True)
class Sizes:
    """What a method trained and kept, of its first run that tells; bytes, NaN where it was not measured."""

    method: Method
    parameters: float
    optimizer: float
    checkpoint: float  # what a run that was cut off resumes from
    weights: float  # what was trained, at the end: the adapters, or the whole model


def sizes(summary: Summary) -> list[Sizes]:
    """For every method that was trained, the plain one first."""
    found = []
    for m in sorted(summary.main, key=lambda m: m is not summary.plain):
        own = next((run["sizes"] for run in m.runs if run.get("sizes")), None)
        if own:
            weights = own.get("adapters_bytes", own.get("student_bytes"))
            kept = own.get("optimizer_bytes"), own.get("checkpoint_bytes"), weights
            found.append(Sizes(m, number(own.get("trained_parameters")), *map(number, kept)))
    return found


@dataclass(frozen=True)
class Curve:
    """A logged quantity of one method over steps: mean, smallest and largest over the seeds."""

    method: Method
    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]

    def end(self) -> float:
        """Mean over the last tenth of the steps."""
        start = self.steps[0] + 0.9 * (self.steps[-1] - self.steps[0])
        return statistics.fmean(v for s, v in zip(self.steps, self.mean, strict=True) if s >= start)


def curves_of(summary: Summary, read: Callable[[dict[str, Any]], float], records: str = "log") -> list[Curve]:
    """The curve of each method that logged the quantity with any value but 0."""
    curves = []
    for method in summary.main:
        seeds = []
        for run in method.runs:
            points = [(number(r.get("step")), read(r)) for r in run.get(records) or []]
            kept = {s: v for s, v in points if math.isfinite(s) and math.isfinite(v)}
            if kept:
                seeds.append(kept)
        steps = sorted(set().union(*seeds)) if seeds else []
        if not steps or all(v == 0 for seed in seeds for v in seed.values()):
            continue  # never logged, or a term that was switched off
        curve = Curve(method, [], [], [], [])
        width = -(-len(steps) // BLOCKS)
        for i in range(0, len(steps), width):
            block = steps[i : i + width]
            present = [[seed[s] for s in block if s in seed] for seed in seeds]
            means = [statistics.fmean(values) for values in present if values]
            curve.steps.append(statistics.fmean(block))
            curve.mean.append(statistics.fmean(means))
            curve.low.append(min(means))
            curve.high.append(max(means))
        curves.append(curve)
    return curves


def gap_of(record: dict[str, Any]) -> float:
    """Teacher–student KL of one logged step, mean of both directions, in nats.

    From the measured diagnostics if they were logged, else the relational term, which is that same KL.
    Rounding may leave a vanishing KL below 0; that counts as 0.
    """
    directions = [number(record.get(f"pair/{d}/kl")) for d in ("image_to_text", "text_to_image")]
    if all(math.isfinite(v) for v in directions):
        gap = statistics.fmean(directions)
    else:
        gap = number(record.get("kl", record.get("relational")))
    return gap if math.isnan(gap) else max(gap, 0.0)


def sampling_error(results: dict[str, Any], summary: Summary) -> float | None:
    """Largest standard error, over the domains, that the choice of test pictures gives one accuracy."""
    errors = []
    for d in results["domains"]:
        count = number(d.get("pictures"))
        column = Column("", "", "", "", (str(d["name"]),))
        for m in summary.methods:
            p = m.stat(column).mean
            if math.isfinite(p) and count > 0:
                errors.append(math.sqrt(max(p * (1 - p), 0.0) / count))
    return max(errors, default=None)


def chances(results: dict[str, Any], summary: Summary) -> list[float]:
    """Accuracy of guessing, per column."""
    by_name = {str(d["name"]): number(d.get("chance")) for d in results["domains"]}
    return [statistics.fmean(by_name[d] for d in c.domains) for c in summary.columns]
