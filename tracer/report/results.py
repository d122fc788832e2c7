"""The results of a comparison: the schema of ``results.json`` as records, and statistics over the seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tracer.errors import UserError

NBSP = "\N{NO-BREAK SPACE}"

DIRECTIONS = ("image_to_text", "text_to_image")

# Where a run's gap between teacher and student comes from; the first source that the run logged is used.
# kl is measured without mixed precision, the others come from the training step and its rounding.
GAP_SOURCES = (("kl",), tuple(f"pair/{direction}/kl" for direction in DIRECTIONS), ("relational",))

Scores = dict[str, dict[str, float]]  # evaluation set → accuracy and ece, fractions in [0, 1]


@dataclass(frozen=True)
class Domain:
    """An evaluation set. ``role`` is in-distribution, near or shifted; ``chance`` is the accuracy of guessing.

    ``expected`` is the number of pictures of the published set; NaN where there is none.
    """

    name: str
    role: str
    pictures: float
    classes: float
    chance: float
    expected: float = math.nan

    @property
    def mark(self) -> str:
        """What tables say of a set of another size than the published one; empty for all others."""
        if not math.isfinite(self.expected) or self.expected == self.pictures:
            return ""
        return f"incomplete: {self.pictures:,.0f} of {self.expected:,.0f}{NBSP}pictures"


@dataclass(frozen=True)
class Run:
    """One training run, or one model that was not trained (``seed`` None).

    ``log`` holds one row for each optimizer step. A quantity that was not measured at a step is missing from
    its row.
    """

    seed: int | None
    eval: Scores
    teacher_eval: Scores
    log: list[dict[str, float]]
    seconds: float
    sizes: dict[str, float]
    notices: tuple[str, ...] = ()
    reliability: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # by set: bins of confidence
    by_class: dict[str, dict[str, tuple[float, float]]] = field(
        default_factory=dict
    )  # class → pictures, right

    def series(self, *keys: str) -> dict[float, float]:
        """Return step → mean of ``keys``, for the steps at which all of them were measured."""
        series = {}
        for row in self.log:
            values = [row.get(key, math.nan) for key in keys]
            if math.isfinite(row.get("step", math.nan)) and all(map(math.isfinite, values)):
                series[row["step"]] = statistics.fmean(values)
        return series

    def gap(self) -> dict[float, float]:
        """Return step → KL(teacher ‖ student) in nats, the mean of both directions.

        Rounding can push a vanishing KL below 0; such a value counts as 0.
        """
        measured = (self.series(*keys) for keys in GAP_SOURCES)
        gap = next((series for series in measured if series), {})
        return {step: max(value, 0.0) for step, value in gap.items()}


@dataclass(frozen=True, eq=False)
class Method:
    """A row of the tables: a method with its runs. A variant names the method of which it lacks a part."""

    key: str
    name: str
    note: str
    runs: list[Run]
    variant_of: str | None = None

    @property
    def trained(self) -> bool:
        """Whether any run has a seed or a log; otherwise the single result has no randomness."""
        return any(run.seed is not None or run.log for run in self.runs)

    def stat(self, column: Column, measure: str = "accuracy", teacher: bool = False) -> Stat:
        """Return mean and spread of ``measure`` (accuracy or ece) over the runs, or over their teachers."""
        scores = [run.teacher_eval if teacher else run.eval for run in self.runs]
        stat = Stat.of((column.read(score, measure) for score in scores), exact=not self.trained)
        return replace(stat, error=column.sampling_error(scores)) if measure == "accuracy" else stat

    def gain_error(self, column: Column, measure: str, teacher: bool = False) -> float:
        """Return half the paired 95 % interval of the change above the start; NaN if it was not measured.

        That of a mean over domains follows from those of the domains, whose pictures were drawn independently.
        """
        scores = [run.teacher_eval if teacher else run.eval for run in self.runs]
        halves = [[_half_interval(score.get(d, {}), measure) for d in column.domains] for score in scores]
        each = [math.hypot(*row) / len(row) for row in halves if row and all(map(math.isfinite, row))]
        return statistics.fmean(each) if each else math.nan


@dataclass(frozen=True)
class Point:
    """The scores of one seed's weights at interpolation coefficient ``alpha``."""

    alpha: float
    seed: int | None
    eval: Scores


@dataclass(frozen=True)
class Interpolation:
    """A method measured along α, from the start (0) to the trained weights (1)."""

    key: str
    name: str
    points: list[Point]


@dataclass(frozen=True)
class Example:
    """A test picture. ``predictions`` maps a method's key to the predicted label and its confidence."""

    image: str
    domain: str
    truth: str
    predictions: dict[str, tuple[str, float]]


@dataclass(frozen=True)
class Column:
    """A column of the tables: the mean over ``domains`` of a measured value."""

    key: str
    group: str
    label: str
    detail: str
    domains: tuple[str, ...]
    chance: float
    pictures: tuple[float, ...] = ()

    def sampling_error(self, scores: Sequence[Scores]) -> float:
        """Return the standard error that the choice of test pictures gives an accuracy; 0 if it is unknown."""
        errors = []
        for domain, pictures in zip(self.domains, self.pictures, strict=False):
            accuracies = [score.get(domain, {}).get("accuracy", math.nan) for score in scores]
            finite = [p for p in accuracies if math.isfinite(p)]
            if finite and pictures > 0:
                p = statistics.fmean(finite)
                errors.append(math.sqrt(max(p * (1 - p), 0.0) / pictures))
        return math.hypot(*errors) / len(errors) if errors else 0.0

    def read(self, scores: Scores, measure: str) -> float:
        """Return the value in one evaluation, a fraction; NaN if a domain was not measured."""
        return statistics.fmean(scores.get(domain, {}).get(measure, math.nan) for domain in self.domains)


@dataclass(frozen=True)
class Stat:
    """Mean over seeds, and the spread: their sample standard deviation, None where one value leaves it unknown.

    ``error`` is the standard error over the choice of the test pictures.
    """

    mean: float
    spread: float | None
    values: tuple[float, ...] = ()
    error: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float], exact: bool = False) -> Stat:
        """Summarise the finite ``values``; ``exact`` says that a single value has no randomness in it."""
        finite = tuple(v for v in values if math.isfinite(v))
        if not finite:
            return cls(math.nan, None)
        if len(finite) == 1:
            return cls(finite[0], 0.0 if exact else None, finite)
        return cls(statistics.fmean(finite), statistics.stdev(finite), finite)


@dataclass(frozen=True)
class Pair:
    """A measure of the method ``one`` minus that of ``other`` on the same pictures, with its paired 95 % interval.

    ``column`` is in-distribution or shifted, the mean over the sets of that role.
    """

    one: str
    other: str
    column: str
    measure: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Results:
    """All results of a comparison, as ``results.json`` holds them, and how they are arranged for reading.

    Every part but ``domains`` and ``methods`` may be empty.
    """

    title: str
    command: str
    start: dict[str, Any]
    domains: list[Domain]
    methods: list[Method]
    curves: list[Interpolation]
    examples: list[Example]
    settings: dict[str, Any]
    versions: dict[str, Any]
    machine: dict[str, Any]
    times: dict[str, float]
    notices: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    soups: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # method → kind → scores

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Results:
        """Build the records from the parsed JSON file.

        Raises:
            UserError: the results hold no domain or no method.
        """
        if not content.get("domains") or not content.get("methods"):
            raise UserError(
                "the results hold no domains or no methods, so there is nothing to report: "
                "run the comparison again"
            )
        return cls(
            title=content.get("title") or "Robust fine-tuning",
            command=content.get("command") or "make demo",
            start=content.get("start") or {},
            domains=[_domain(domain) for domain in content["domains"]],
            methods=[_method(method) for method in content["methods"]],
            curves=[_interpolation(curve) for curve in content.get("curves") or []],
            examples=[_example(example) for example in content.get("examples") or []],
            settings=content.get("settings") or {},
            versions=content.get("versions") or {},
            machine=content.get("machine") or {},
            times=content.get("times") or {},
            notices=[str(text) for text in content.get("notices") or []],
            pairs=[Pair(**pair) for pair in content.get("pairs") or []],
            choices=content.get("choices") or {},
            soups=content.get("soups") or {},
        )

    @cached_property
    def cautions(self) -> list[str]:
        """Return what was warned about, each sentence once; one about a run names its method."""
        own = [f"{m.name}: {text}" for m in self.methods for run in m.runs for text in run.notices]
        of_sets = {
            text for m in self.methods for run in m.runs for text in run.notices if text.startswith("'")
        }
        own = [text for text in own if text.partition(": ")[2] not in of_sets]
        return list(dict.fromkeys([*self.notices, *sorted(of_sets), *own]))

    @cached_property
    def main(self) -> list[Method]:
        """Return the methods that are compared with each other: all but the variants."""
        return [m for m in self.methods if m.variant_of is None]

    @cached_property
    def variants(self) -> dict[Method, list[Method]]:
        """Return the variants of each method that has any."""
        groups = {full: [m for m in self.methods if m.variant_of == full.key] for full in self.main}
        return {full: group for full, group in groups.items() if group}

    @cached_property
    def baseline(self) -> Method | None:
        """Return the method that the others are measured against: zero-shot, or else the first untrained one."""
        named = next((m for m in self.methods if m.key == "zero-shot"), None)
        return named or next((m for m in self.methods if not m.trained), None)

    @cached_property
    def plain(self) -> Method | None:
        """Return the method without regularisation: flyp, or flyp-multi, or else the first trained method."""
        named = [m for key in ("flyp", "flyp-multi") for m in self.methods if m.key == key]
        return next((m for m in (*named, *self.methods) if m in named or m.trained), None)

    @cached_property
    def in_distribution(self) -> Column:
        """Return the mean over the in-distribution domains; the first domain where none has that role."""
        return _mean_column(self._home, "in-distribution", "In distribution")

    @cached_property
    def under_shift(self) -> Column | None:
        """Return the mean over the shifted domains, if there are any."""
        shifted = self._shifted
        return _mean_column(shifted, "shifted", "Under shift") if shifted else None

    @cached_property
    def columns(self) -> list[Column]:
        """Return the columns of the tables: the means, then each domain that they do not already show alone."""
        columns = [self.in_distribution] + ([self.under_shift] if self.under_shift else [])
        if len(self._home) > 1:
            columns += [domain_column(d, "In distribution") for d in self._home]
        for role in dict.fromkeys(d.role for d in self.domains):
            if role != "shifted" or len(self._shifted) > 1:
                rest = [d for d in self.domains if d.role == role and d not in self._home]
                columns += [domain_column(d, role.capitalize()) for d in rest]
        return columns

    @property
    def _home(self) -> list[Domain]:
        return [d for d in self.domains if d.role == "in-distribution"] or self.domains[:1]

    @property
    def _shifted(self) -> list[Domain]:
        return [d for d in self.domains if d.role == "shifted" and d not in self._home]

    @cached_property
    def seeds(self) -> int:
        """Return the largest number of runs with a seed that a method has."""
        return max(sum(run.seed is not None for run in m.runs) for m in self.methods)

    def place(self, method: Method) -> int:
        """Return the position that decides colour and marker; a variant takes its method's."""
        keys = [m.key for m in self.methods]
        return keys.index(method.variant_of if method.variant_of in keys else method.key)


def read_results(path: Path) -> Results:
    """Read ``results.json``.

    Raises:
        UserError: the file holds no domain or no method.
    """
    return Results.from_json(json.loads(path.read_text(encoding="utf-8")))


def number(value: Any) -> float:
    """Return ``value`` as a float; NaN for None and for anything else that is not a number."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _numbers(values: dict[str, Any] | None) -> dict[str, float]:
    return {str(name): number(value) for name, value in (values or {}).items()}


def scores_of(content: dict[str, Any] | None) -> Scores:
    """Return the scores of a part of results.json as numbers."""
    return {str(name): _numbers(score) for name, score in (content or {}).items()}


def _domain(content: dict[str, Any]) -> Domain:
    sizes = (number(content.get(key)) for key in ("pictures", "classes", "chance", "expected"))
    return Domain(str(content["name"]), str(content.get("kind", "shifted")), *sizes)


def _run(content: dict[str, Any]) -> Run:
    scores = {str(of): score or {} for of, score in (content.get("eval") or {}).items()}
    return Run(
        reliability={
            of: [_numbers(b) for b in score.get("reliability") or ()] for of, score in scores.items()
        },
        by_class={
            of: {
                name: (number(n), number(right)) for name, (n, right) in (score.get("by_class") or {}).items()
            }
            for of, score in scores.items()
        },
        seed=content.get("seed"),
        eval=scores_of(content.get("eval")),
        teacher_eval=scores_of(content.get("teacher_eval")),
        log=[_numbers(row) for row in content.get("log") or []],
        seconds=number(content.get("seconds")),
        sizes=_numbers(content.get("sizes")),
        notices=tuple(map(str, content.get("notices") or ())),
    )


def _half_interval(score: dict[str, float], measure: str) -> float:
    """Return the distance from a gain to the bound of its interval that is nearer to 0; see Method.gain_error."""
    gain, low, high = (score.get(f"{measure}_gain{bound}", math.nan) for bound in ("", "_low", "_high"))
    return gain - low if gain > 0 else high - gain


def _method(content: dict[str, Any]) -> Method:
    key, runs = str(content["key"]), [_run(run) for run in content.get("runs") or []]
    name, note = str(content.get("name") or key), str(content.get("note") or "")
    return Method(key, name, note, runs, content.get("variant_of"))


def _interpolation(content: dict[str, Any]) -> Interpolation:
    points = [
        Point(number(point.get("alpha")), point.get("seed"), scores_of(point.get("eval")))
        for point in content["points"]
    ]
    return Interpolation(str(content["key"]), str(content["name"]), points)


def _example(content: dict[str, Any]) -> Example:
    predictions = {
        str(key): (str(label), number(confidence))
        for key, (label, confidence) in (content.get("predictions") or {}).items()
    }
    image, domain, truth = (str(content.get(key, "")) for key in ("image", "domain", "truth"))
    return Example(image, domain, truth, predictions)


def domain_column(domain: Domain, group: str) -> Column:
    """Return the column of one domain, under the heading ``group``."""
    sizes = {"pictures": domain.pictures, "classes": domain.classes}
    told = [f"{size:.0f}{NBSP}{what}" for what, size in sizes.items() if math.isfinite(size)]
    detail = ", ".join([domain.mark, *told[1:]] if domain.mark else told)
    return Column(domain.name, group, domain.name, detail, (domain.name,), domain.chance, (domain.pictures,))


def _mean_column(domains: list[Domain], key: str, label: str) -> Column:
    names = tuple(d.name for d in domains)
    detail = f"mean of {len(domains)}" if len(domains) > 1 else names[0]
    if any(d.mark for d in domains):
        detail += ", incomplete" if len(domains) == 1 else ", some incomplete"
    pictures = tuple(d.pictures for d in domains)
    return Column(key, "Summary", label, detail, names, statistics.fmean(d.chance for d in domains), pictures)


def clearly_differ(a: Stat, b: Stat, paired_error: float = math.nan) -> bool:
    """Return whether two means differ by more than seeds and test pictures explain.

    The difference must exceed the sum of both spreads, and the error that the choice of the test pictures gives
    it: half the paired 95 % interval where it was measured (``paired_error``), else the standard error of two
    independent samples, which the shared pictures make about twice too large.
    """
    if a.spread is None or b.spread is None:
        return False
    known = math.isfinite(paired_error)
    error = paired_error if known else math.hypot(a.error, b.error)
    return abs(a.mean - b.mean) > max(a.spread + b.spread, error)


def best_of(stats: Sequence[Stat], lower_is_better: bool = False) -> int | None:
    """Return the index of the best mean, if it differs clearly from every other; else None."""
    known = [i for i, s in enumerate(stats) if math.isfinite(s.mean)]
    if len(known) < 2:
        return None
    best = (min if lower_is_better else max)(known, key=lambda i: stats[i].mean)
    return best if all(clearly_differ(stats[best], stats[i]) for i in known if i != best) else None


def sampling_error(results: Results) -> float | None:
    """Return the largest standard error, over the domains, that the choice of test pictures gives an accuracy."""
    errors = []
    for domain in results.domains:
        for method in results.methods:
            p = method.stat(domain_column(domain, "")).mean
            if math.isfinite(p) and domain.pictures > 0:
                errors.append(math.sqrt(max(p * (1 - p), 0.0) / domain.pictures))
    return max(errors, default=None)


@dataclass(frozen=True)
class Sizes:
    """What a method trains and keeps: a number of parameters, then bytes; NaN where it was not measured."""

    method: Method
    parameters: float
    optimizer: float
    checkpoint: float  # from which an interrupted run resumes
    weights: float  # what was trained, at the end: the adapters, or the whole model


def sizes_of(results: Results) -> list[Sizes]:
    """Return the sizes of each trained method, from its first run that recorded them; the plain one first."""
    table = []
    for method in sorted(results.main, key=lambda m: m is not results.plain):
        recorded = next((run.sizes for run in method.runs if run.sizes), {})
        if recorded:
            weights = "adapters_bytes" if "adapters_bytes" in recorded else "student_bytes"
            keys = ("trained_parameters", "optimizer_bytes", "checkpoint_bytes", weights)
            table.append(Sizes(method, *(recorded.get(key, math.nan) for key in keys)))
    return table
