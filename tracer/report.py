"""The report of a comparison: one self-contained HTML page, and its main table on the terminal.

Both functions only read a results dictionary (the content of ``results.json``); nothing is measured
here, and every sentence on the page is computed from the numbers it talks about.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tracer.errors import UserError

ASSETS = Path(__file__).parent / "assets"

# One colour and one marker a method, by its place in the results, the same in every figure and table.
# Tuned from Okabe and Ito's colour-blind-safe set; (on light, on dark). More methods than colours repeat.
COLOURS = (
    ("#56616c", "#aab6c2"),
    ("#c64a06", "#ff8f50"),
    ("#a83c86", "#ea8fcb"),
    ("#0a62b4", "#5fb1ff"),
    ("#07815a", "#40cf9d"),
    ("#8a6400", "#e6b53c"),
    ("#007784", "#52d0dc"),
    ("#7a4a2b", "#d39b78"),
)
MARKERS = "*osD^vPX"
DASHES: tuple[Any, ...] = ("-", "-", (0, (5, 2)), "-", (0, (3, 1.5)), "-.", (0, (1, 1)), (0, (7, 2, 1, 2)))
# Drawn in these, then replaced by the page's own variables, so that the figures follow dark mode.
INK, MUTED, GRID, PAPER = "#1b2129", "#5d6773", "#dde2e7", "#fdfdfd"

STYLE = {
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "tracer",  # the same results give the same file
}

# Logged quantities shown openly, with their titles; everything else that was logged is folded away.
CURVES = {
    "loss": "Total loss",
    "contrastive": "Contrastive term",
    "relational": "Relational term (CRD)",
    "interactive": "Interactive term (ICL)",
    "cross": "Cross term (XKD)",
    "feature": "Feature term (FD)",
}
PARTS = ("start", "times", "machine", "versions", "settings")  # that results may lack
NBSP = "\N{NO-BREAK SPACE}"
BLOCKS = 100  # most points of a curve: longer logs are averaged over blocks of steps


# --- numbers ------------------------------------------------------------------------------------


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


# --- text ---------------------------------------------------------------------------------------


def percent(value: float, signed: bool = False) -> str:
    """A fraction in per cent with one decimal: 41.2, with a sign +3.1, −0.4; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", "−")


def with_spread(stat: Stat) -> str:
    """41.2 ± 0.3, without the spread where it is unknown or there is none."""
    return percent(stat.mean) + (
        f"{NBSP}±{NBSP}{percent(stat.spread)}" if stat.spread and len(stat.values) > 1 else ""
    )


def amount(value: float) -> str:
    """A number of any size in two or three figures: 1,300, 0.35, 0.000027, 3e−09; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    rounded = float(f"{value:.{3 if 1 <= abs(value) < 100 else 2}g}")
    if rounded == 0 or 1e-6 <= abs(rounded) < 1e9:
        text = f"{rounded:,.8f}".rstrip("0").rstrip(".")
    else:
        text = f"{rounded:g}"
    return text.replace("-", "−")


def duration(seconds: Any) -> str:
    """Seconds in words: 0.42 s, 31.2 s, 4 min 07 s, 2 h 05 min."""
    s = number(seconds)
    if not math.isfinite(s):
        return "–"
    if s < 100:
        return f"{s:.3g} s"
    if s < 3600:
        return f"{round(s) // 60} min {round(s) % 60:02d} s"
    return f"{round(s / 60) // 60} h {round(s / 60) % 60:02d} min"


def listing(items: Sequence[str]) -> str:
    """A, B and C."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def seeds_of(summary: Summary) -> int:
    """The largest number of runs with a seed that a method has."""
    return max(sum(run.get("seed") is not None for run in m.runs) for m in summary.methods)


def change(stat: Stat, base: Stat) -> str:
    """The change of ``stat`` against ``base`` in points, and how far the seeds let one trust it."""
    text = f"{percent(stat.mean - base.mean, signed=True)} points"
    if stat.spread is None or base.spread is None:
        return text
    return text if clearly_differ(stat, base) else f"{text} (within the spread)"


def headline(summary: Summary) -> str:
    """What happened, in one sentence: the best of the trained methods where it counts, beside the others."""
    column, where = (summary.away, "under shift") if summary.away else (summary.home, "in distribution")
    assert column is not None
    ranked = sorted(
        (m for m in summary.main if m.trained and math.isfinite(m.stat(column).mean)),
        key=lambda m: -m.stat(column).mean,
    )
    if not ranked:
        return "No training run has a usable result."
    best, rest = ranked[0], ranked[1:]
    rivals = [m.name for m in rest if not clearly_differ(best.stat(column), m.stat(column))]
    if not rest:
        text = f"{best.name} reaches {with_spread(best.stat(column))} % {where}"
    elif best.stat(column).spread is None:
        text = f"{best.name} scores highest {where}, with one seed: {percent(best.stat(column).mean)} %"
    elif not rivals:
        text = f"{best.name} is the best fine-tuned model {where}: {with_spread(best.stat(column))} %"
    else:
        text = (
            f"No fine-tuned model is clearly ahead {where}: {best.name} is highest with "
            f"{with_spread(best.stat(column))} %, {listing(rivals)} within the spread"
        )
    others = [
        f"{m.name} {with_spread(m.stat(column))} %"
        for m in (summary.baseline, summary.plain)
        if m is not None and m is not best and math.isfinite(m.stat(column).mean)
    ]
    return text + (f" ({', '.join(others)})." if others else ".")


def findings(summary: Summary) -> list[tuple[str, str]]:
    """Further sentences: (topic, what this run shows)."""
    found: list[tuple[str, str]] = []
    trained = [m for m in summary.main if m.trained]
    base = summary.baseline
    if base is not None and trained:
        start = base.stat(summary.home)
        gains = [
            f"{m.name} {change(m.stat(summary.home), start)}"
            for m in trained
            if math.isfinite(m.stat(summary.home).mean)
        ]
        if gains and math.isfinite(start.mean):
            found.append(
                ("In distribution", f"{base.name} starts at {percent(start.mean)} %; {'; '.join(gains)}.")
            )
    if base is not None and summary.away is not None and summary.plain is not None:
        shift = _shift_sentence(summary, base, summary.plain, summary.away)
        if shift:
            found.append(("Under shift", shift))
    gap = gap_sentence(summary)
    if gap:
        found.append(("Teacher–student gap", gap))
    column = summary.away or summary.home
    found += ablations(summary) + size_sentence(summary)
    calibrated = [m for m in summary.main if math.isfinite(m.stat(column, "ece").mean)]
    if len(calibrated) > 1:
        ranked = sorted(calibrated, key=lambda m: m.stat(column, "ece").mean)
        values = [f"{m.name} {with_spread(m.stat(column, 'ece'))}" for m in ranked]
        found.append(
            (
                "Calibration",
                f"Expected calibration error {column.label.lower()}, in points, from best to worst: "
                f"{', '.join(values)}.",
            )
        )
    return found


def _shift_sentence(summary: Summary, base: Method, plain: Method, away: Column) -> str:
    start, fallen = base.stat(away), plain.stat(away)
    if plain is base or not (math.isfinite(start.mean) and math.isfinite(fallen.mean)):
        return ""
    lost = start.mean - fallen.mean
    text = f"{base.name} starts at {percent(start.mean)} %; {plain.name} {change(fallen, start)}. "
    others = [m for m in summary.main if m.trained and m is not plain and math.isfinite(m.stat(away).mean)]
    if not others:
        return text.strip()
    no_loss = lost <= 0 or (fallen.spread is not None and not clearly_differ(start, fallen))
    parts = []
    for m in others:
        now = m.stat(away)
        saved = now.mean - fallen.mean
        if no_loss:
            part = percent(saved, signed=True)
        elif saved < 0:
            part = f"loses {percent(-saved)} more"
        elif now.mean < start.mean:
            part = f"keeps {percent(saved)}"
        elif clearly_differ(now, start):
            part = f"keeps them all and gains {percent(now.mean - start.mean)}"
        else:
            part = "keeps them all"
        known = now.spread is not None and fallen.spread is not None
        unsure = " (within the spread)" if known and not clearly_differ(now, fallen) else ""
        parts.append(f"{m.name} {part}{unsure}")
    if no_loss:
        return text + f"{plain.name} shows no clear loss; against it {listing(parts)}."
    return text + f"Of the {percent(lost)} points that {plain.name} loses, {listing(parts)}."


def ablations(summary: Summary) -> list[tuple[str, str]]:
    """What each variant of a method changes against it, unless that is within the spread."""
    found = []
    columns = [c for c in (summary.home, summary.away) if c is not None]
    for full, variants in summary.parts.items():
        changed: list[str] = []
        unchanged: list[str] = []
        for m in variants:
            pairs = [(c, m.stat(c), full.stat(c)) for c in columns]
            clear = [
                f"{c.label.lower()} {change(a, b)}"
                for c, a, b in pairs
                if clearly_differ(a, b) or a.spread is None or b.spread is None
            ]
            (changed if clear else unchanged).append(f"{m.name}: {', '.join(clear)}" if clear else m.name)
        sentences = [f"Against the full method, {'; '.join(changed)}."] if changed else []
        if unchanged:
            sentences.append(f"Within the spread of the full method: {listing(unchanged)}.")
        found.append((f"Parts of {full.name}", " ".join(sentences)))
    return found


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


def size_sentence(summary: Summary) -> list[tuple[str, str]]:
    """How much less a method that trains a part of the model keeps than the plain one."""
    measured = sizes(summary)
    if not measured or measured[0].method is not summary.plain:
        return []
    whole, parts = measured[0], []
    for own in measured:
        if own.parameters < whole.parameters:
            kinds = {
                "optimizer state": "optimizer",
                "a checkpoint": "checkpoint",
                "trained weights": "weights",
            }
            pairs = {what: (getattr(own, kind), getattr(whole, kind)) for what, kind in kinds.items()}
            kept = [
                f"{what} {amount(a / 1e6)} MB against {amount(b / 1e6)}"
                for what, (a, b) in pairs.items()
                if math.isfinite(a) and math.isfinite(b)
            ]
            parts.append(
                f"{own.method.name} trains {own.parameters:,.0f} parameters, "
                f"{percent(own.parameters / whole.parameters)} % of {whole.method.name}'s: {', '.join(kept)}."
            )
    return [("Size", " ".join(parts))] if parts else []


# --- curves -------------------------------------------------------------------------------------


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


def gap_sentence(summary: Summary) -> str:
    """What the teacher–student KL of this run shows, next to the published claim."""
    curves = curves_of(summary, gap_of)
    if not curves:
        return ""
    ends, peaks = {c.method.key: c.end() for c in curves}, {c.method.key: max(c.mean) for c in curves}
    parts = []
    for c in curves:
        end, peak = ends[c.method.key], peaks[c.method.key]
        word = "collapses" if end < 0.1 * peak else "shrinks" if end < 0.5 * peak else "stays"
        parts.append(
            f"{c.method.name}: the gap {word} (largest {amount(peak)}, at the end {amount(end)}: "
            f"{amount(100 * end / peak)} % of it)"
        )
    text = f"{'; '.join(parts)}."
    if "ema" in ends and "wma" in ends:
        times = f"{amount(ends['wma'] / ends['ema'])} times" if ends["ema"] else "infinitely many times"
        text += f" At the end WMA's teacher is {times} as far from its student as EMA's."
        ema_gone = ends["ema"] < 0.1 * max(peaks["ema"], ends["wma"])
        wma_kept = ends["wma"] >= 0.1 * peaks["wma"]
        claim = "The published claim, that EMA's gap collapses and WMA's does not,"
        if ema_gone and wma_kept:
            text += f" {claim} is what this run shows."
        else:
            why = [] if ema_gone else ["EMA's does not collapse"]
            why += [] if wma_kept else ["WMA's collapses too"]
            text += f" {claim} is not what this run shows: {listing(why)}."
    return text


# --- figures ------------------------------------------------------------------------------------


def colour(method: Method) -> str:
    """The method's colour on a light page (the page replaces it by a variable)."""
    return COLOURS[method.index % len(COLOURS)][0]


def marker(method: Method) -> str:
    """The method's marker."""
    return MARKERS[method.index % len(MARKERS)]


class Drawing:
    """Draws figures and turns them into SVG elements that take their colours from the page."""

    def __init__(self) -> None:
        self.count = 0

    def axes(self, width: float, height: float) -> Axes:
        """Axes of a new figure; sizes in inches, chosen so that text stays readable on a phone."""
        return Figure(figsize=(width, height), layout="constrained").add_subplot()

    def svg(self, axes: Axes, label: str) -> Markup:
        """The figure as an inline SVG element; ``label`` describes it to a screen reader."""
        self.count += 1
        out = io.StringIO()
        with warnings.catch_warnings():  # the browser's fonts draw what matplotlib's lack
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            axes.get_figure(root=True).savefig(  # type: ignore[union-attr]
                out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
            )
        text = out.getvalue()
        body = text[text.index(">", text.index("<svg")) + 1 :]
        body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
        body = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>f{self.count}-", body)
        body = body.replace("xlink:href", "href").replace("'DejaVu Sans'", "system-ui, sans-serif")
        for hexcode, name in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid"), (PAPER, "paper")):
            body = body.replace(hexcode, f"var(--{name})")
        for i, (light, _) in enumerate(COLOURS):
            body = body.replace(light, f"var(--m{i})")
        box = re.search(r'viewBox="([^"]*)"', text)
        assert box is not None
        body = "".join(line.strip() + "\n" for line in body.splitlines() if line.strip())
        return Markup('<svg viewBox="{}" role="img" aria-label="{}">\n').format(box[1], label) + Markup(body)

    def trade_off(self, results: dict[str, Any], summary: Summary) -> Markup:
        """In-distribution accuracy against accuracy under shift: every seed, the means, lines over α."""
        home, away = summary.home, summary.away
        assert away is not None
        ax = self.axes(4.8, 4.3)
        base = summary.baseline
        if base is not None:
            ax.axvline(100 * base.stat(home).mean, color=MUTED, linewidth=0.9, linestyle=":")
            ax.axhline(100 * base.stat(away).mean, color=MUTED, linewidth=0.9, linestyle=":")
        tints = {m.key: colour(m) for m in summary.methods}
        for curve in results.get("curves") or []:
            line: dict[float, list[tuple[float, float]]] = {}
            for point in curve["points"]:
                xy = home.read(point.get("eval"), "accuracy"), away.read(point.get("eval"), "accuracy")
                if all(map(math.isfinite, xy)):
                    line.setdefault(number(point.get("alpha")), []).append(xy)
            means = [
                [100 * statistics.fmean(axis) for axis in zip(*line[a], strict=True)] for a in sorted(line)
            ]
            if means:
                tint = tints.get(str(curve["key"]), MUTED)
                ax.plot(
                    *zip(*means, strict=True), color=tint, linewidth=1.6, marker="|", markersize=6, zorder=2,
                    label=f"{curve['name']}, α from 0 to 1",
                )  # fmt: skip
                for alpha, point in list(zip(sorted(line), means, strict=True))[1:-1]:
                    ax.annotate(amount(alpha), (point[0], point[1]), xytext=(4, 5), color=tint,
                                textcoords="offset points", fontsize=8, zorder=5)  # fmt: skip
        for m in summary.main:
            pairs = [
                (100 * home.read(run.get("eval"), "accuracy"), 100 * away.read(run.get("eval"), "accuracy"))
                for run in m.runs
            ]
            pairs = [p for p in pairs if all(map(math.isfinite, p))]
            if not pairs:
                continue
            xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
            if len(pairs) > 1:
                ax.scatter(
                    xs, ys, s=30, marker=marker(m), color=colour(m), alpha=0.55, linewidths=0, zorder=3
                )
            ax.scatter(
                statistics.fmean(xs), statistics.fmean(ys),
                s=240 if marker(m) == "*" else 105, marker=marker(m), color=colour(m), edgecolors=PAPER,
                linewidths=1.2, zorder=4, label=m.name,
            )  # fmt: skip
        ax.margins(0.09)
        ax.set_xlabel(f"Accuracy in distribution ({home.detail}), %")
        ax.set_ylabel(f"Accuracy under shift ({away.detail}), %")
        _legend_below(ax)
        return self.svg(ax, "Accuracy in distribution against accuracy under shift, one marker a method")

    def curve(self, curves: list[Curve], title: str, log: bool = False, height: float = 3.0) -> Markup:
        """A quantity over the steps: mean over the seeds as a line, smallest to largest as a band."""
        ax = self.axes(4.4, height)
        # a log axis cannot show 0: the line pauses there, and the band reaches down to the smallest mean
        shown = [v for c in curves for v in c.mean if v > 0 or not log]
        for c in curves:
            alone = len(c.steps) == 1
            mean = [v if v > 0 or not log else math.nan for v in c.mean]
            low = [max(v, min(shown)) if log else v for v in c.low]
            high = [max(v, min(shown)) if log else v for v in c.high]
            ax.plot(
                c.steps, mean, color=colour(c.method), linestyle=DASHES[c.method.index % len(DASHES)],
                label=c.method.name, marker=marker(c.method) if alone or len(c.steps) <= 15 else None,
                markersize=5,
            )  # fmt: skip
            if not alone and c.low != c.high:
                ax.fill_between(c.steps, low, high, color=colour(c.method), alpha=0.18, linewidth=0)
        if log:
            ax.set_yscale("log")
            narrow = max(shown) < 300 * min(shown)
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
            ax.yaxis.set_major_formatter(lambda v, _: amount(v))
            ax.yaxis.set_minor_formatter(NullFormatter())
        else:
            ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel("Step")
        ax.set_title(title)
        _legend_below(ax)
        return self.svg(ax, f"{title} over the steps: {listing([c.method.name for c in curves])}")

    def bars(self, summary: Summary, column: Column, top: float, chance: float) -> Markup:
        """Accuracy of every method in one domain, the seeds as points, zero-shot and chance as lines."""
        methods = [m for m in summary.main if math.isfinite(m.stat(column).mean)]
        ax = self.axes(4.4, 0.85 + 0.32 * len(methods))
        for y, m in enumerate(methods):
            stat = m.stat(column)
            ax.barh(y, 100 * stat.mean, height=0.66, color=colour(m), alpha=0.85)
            if len(stat.values) > 1:
                ax.plot([100 * v for v in stat.values], [y] * len(stat.values), "o", markersize=4, color=INK,
                        markeredgecolor=PAPER, markeredgewidth=0.7)  # fmt: skip
            ax.annotate(percent(stat.mean), (100 * max(stat.values), y), xytext=(7, 0), va="center",
                        textcoords="offset points", fontsize=9.5, zorder=5,
                        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6})  # fmt: skip
        if summary.baseline is not None and math.isfinite(summary.baseline.stat(column).mean):
            ax.axvline(100 * summary.baseline.stat(column).mean, color=INK, linewidth=1, linestyle=":")
        if math.isfinite(chance):
            ax.axvline(100 * chance, color=MUTED, linewidth=1)
        ax.set_yticks(range(len(methods)), [m.name for m in methods])
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set_xlim(0, 100 * top)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_xlabel("Accuracy, %")
        ax.set_title(f"{column.label} ({column.group.lower()})")
        return self.svg(ax, f"Accuracy on {column.label} by method")


def _legend_below(ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        ax.get_figure(root=True).legend(handles, labels, loc="outside lower left", ncols=2)  # type: ignore[union-attr]


# --- the page -----------------------------------------------------------------------------------


def write_report(results: dict[str, Any], path: Path) -> Path:
    """Write the HTML page that shows ``results``; it holds all it needs and asks for nothing else.

    Args:
        results: title, start, domains, methods (with their runs), curves (over an interpolation weight α),
            examples, settings, versions, machine and times; and optionally command, the line that repeats
            the run.
        path: where to write. The file appears only when it is complete. Relative paths of example
            pictures are looked up from the working directory, then from the page's folder.

    Raises:
        ValueError: there is no domain or no method to report on.
        UserError: the page cannot be written.
    """
    path = Path(path)
    page = render(results, path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the report ({error.strerror or error}); "
            "free some space or choose another output folder"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def render(results: dict[str, Any], folder: Path) -> str:
    """The page as text."""
    summary = summarise(results)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, duration=duration, with_spread=with_spread, amount=lambda v: amount(number(v))
    )
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # its stub knows no plain str keys
        figures = draw(results, summary)
    return environment.get_template("report.html.j2").render(
        results={**dict.fromkeys(PARTS), "title": "Robust fine-tuning", "command": "make demo", **results},
        summary=summary,
        colours=COLOURS,
        headline=headline(summary),
        findings=findings(summary),
        seeds=seeds_of(summary),
        accuracy=table(summary, "accuracy"),
        ece=table(summary, "ece"),
        teachers=table(summary, "accuracy", of="teacher_eval"),
        parts={
            full: [table(summary, what, full=full) for what in ("accuracy", "ece")] for full in summary.parts
        },
        sizes=sizes(summary),
        sampling=sampling_error(results, summary),
        chances=chances(results, summary),
        runs=[(m, run) for m in summary.methods for run in m.runs],
        examples=[example(e, summary, folder) for e in results.get("examples") or []],
        number=number,
        isfinite=math.isfinite,
        **figures,
    )


def table(summary: Summary, what: str, of: str = "eval", full: Method | None = None) -> list[dict[str, Any]]:
    """Rows of a table: for each method its cells, with the best of a column and clear changes marked.

    Changes are against the baseline; of ``full``, a method with variants, against it, with its variants as rows.
    """
    lower = what == "ece"
    base = full or summary.baseline
    methods = [full, *summary.parts[full]] if full else summary.main
    methods = [m for m in methods if any(math.isfinite(m.stat(c, what, of).mean) for c in summary.columns)]
    columns = [(c, [m.stat(c, what, of) for m in methods]) for c in summary.columns]
    rows = []
    for i, m in enumerate(methods):
        cells = []
        for c, stats in columns:
            stat, change, trend = stats[i], math.nan, ""
            if base is not None and m is not base:
                start = base.stat(c, what)
                change = stat.mean - start.mean
                if clearly_differ(stat, start):
                    trend = "up" if (change < 0) == lower else "down"
            cells.append({"stat": stat, "best": best_of(stats, lower) == i, "change": change, "trend": trend})
        rows.append({"method": m, "cells": cells})
    return rows


def draw(results: dict[str, Any], summary: Summary) -> dict[str, Any]:
    """All figures of the page, by the name under which the template places them."""
    drawing = Drawing()
    chance = {str(d["name"]): number(d.get("chance")) for d in results["domains"]}
    single = {c.domains[0]: c for c in summary.columns if len(c.domains) == 1 and c.group != "Summary"}
    for d in results["domains"]:  # a domain that only the summary shows gets its own bars all the same
        name = str(d["name"])
        single.setdefault(name, Column(name, str(d.get("kind", "shifted")), name, "", (name,)))
    values = [
        v for m in summary.main for c in single.values() for v in m.stat(c).values
    ] + [v for v in chance.values() if math.isfinite(v)]  # fmt: skip
    top = 1.18 * max(values, default=1.0) or 1.0
    bars = [
        drawing.bars(summary, single[str(d["name"])], top, chance[str(d["name"])])
        for d in results["domains"]
        if any(math.isfinite(m.stat(single[str(d["name"])]).mean) for m in summary.methods)
    ]
    gap = curves_of(summary, gap_of)
    keys = {k for m in summary.main for run in m.runs for r in run.get("log") or [] for k in r} - {"step"}

    def logged(names: Iterable[str]) -> list[Markup]:
        drawn = []
        for name in names:
            curves = curves_of(summary, lambda r, name=name: number(r.get(name)))  # type: ignore[misc]
            if curves:
                drawn.append(drawing.curve(curves, CURVES.get(name, name), height=2.7))
        return drawn

    def evaluated(column: Column | None) -> list[Markup]:
        if column is None:
            return []
        curves = curves_of(summary, lambda r: 100 * column.read(r.get("eval"), "accuracy"), "curve")
        return [drawing.curve(curves, f"{column.label}: accuracy, %", height=2.7)] if curves else []

    return {
        "trade_off": drawing.trade_off(results, summary) if summary.away else None,
        "gap": drawing.curve(gap, "Teacher–student KL, nats (log scale)", True, 4.0) if gap else None,
        "bars": bars,
        "progress": evaluated(summary.home) + evaluated(summary.away),
        "terms": logged(CURVES),
        "others": logged(sorted(keys - set(CURVES))),
        "block": max((-(-len(run.get("log") or []) // BLOCKS) for m in summary.methods for run in m.runs),
                     default=1),
    }  # fmt: skip


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


def example(item: dict[str, Any], summary: Summary, folder: Path) -> dict[str, Any]:
    """One example picture, embedded, and what each method called it."""
    predictions = item.get("predictions") or {}
    truth = str(item.get("truth", ""))
    rows = []
    for m in summary.methods:
        if m.key in predictions:
            label, confidence = (list(predictions[m.key] or []) + [None, None])[:2]
            rows.append({"method": m, "label": str(label), "confidence": number(confidence),
                         "right": str(label) == truth})  # fmt: skip
    return {"picture": embed(item.get("image"), folder), "domain": str(item.get("domain", "")),
            "truth": truth, "rows": rows}  # fmt: skip


def embed(image: Any, folder: Path, size: int = 192) -> str | None:
    """A picture as a data URI (PNG, at most ``size`` pixels wide and high); None if it cannot be read."""
    for path in (Path(str(image)), folder / str(image)):
        try:
            with Image.open(path) as picture:
                small = picture.convert("RGBA")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        small.thumbnail((size, size))
        out = io.BytesIO()
        small.save(out, format="PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    return None


# --- the terminal -------------------------------------------------------------------------------


def print_table(results: dict[str, Any]) -> None:
    """Print the page's headline and main table: accuracy in per cent, mean ± spread over the seeds.

    Raises:
        ValueError: there is no domain or no method to report on.
    """
    summary = summarise(results)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a log file: never break the columns

    def printable(text: str, style: str = "") -> Text:
        text = text.replace(NBSP, " ")
        for fancy, simple in (("−", "-"), ("–", "-"), ("±", "+/-")):
            if not fancy.encode(console.encoding, "ignore"):
                text = text.replace(fancy, simple)
        return Text(text.encode(console.encoding, "replace").decode(console.encoding), style)

    shown = Table(
        title=printable(str(results.get("title") or "")),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    shown.add_column("Accuracy, %", no_wrap=True)
    for c in summary.columns:
        detail = c.detail if c.group == "Summary" else c.group.lower()
        shown.add_column(printable(f"{c.label}\n{detail}"), justify="right")

    def add(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            cells = []
            for cell in row["cells"]:
                text = with_spread(cell["stat"]) + (" *" if cell["best"] else "")
                if math.isfinite(cell["change"]):
                    text += "\n" + percent(cell["change"], signed=True)
                cells.append(printable(text, "bold" if cell["best"] else ""))
            shown.add_row(printable(row["method"].name), *cells)
        shown.add_section()

    add(table(summary, "accuracy"))
    for full in summary.parts:
        add(table(summary, "accuracy", full=full)[1:])
    shown.add_row("Chance", *(printable(percent(v)) for v in chances(results, summary)), style="dim")
    console.print(shown)
    start = summary.baseline.name if summary.baseline else "the start"
    of_parts = "".join(f", for its parts against {full.name}" for full in summary.parts)
    marks = f"Second line: change against {start}{of_parts}, in points. *: clearly the best of its column."
    console.print(printable(marks, "dim"))
    for _, text in size_sentence(summary):
        console.print(printable(text))
    console.print(printable(headline(summary), "bold"))
