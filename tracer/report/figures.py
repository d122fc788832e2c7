"""Figures of the report, as SVG elements that take their colours from the page."""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from tracer.report.curves import LoggedCurve, logged_curves
from tracer.report.palette import COLOURS, DASHES, MARKERS, PAGE
from tracer.report.results import (
    DIRECTIONS,
    Column,
    Domain,
    Interpolation,
    Method,
    Results,
    Run,
    domain_column,
    number,
)
from tracer.report.sentences import amount, listing, percent

# Figures are drawn in the colours of a light page, which svg() then replaces by the page's own variables.
INK, MUTED, GRID, PAPER = (PAGE[name][0] for name in ("ink", "muted", "grid", "paper"))

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

CALIBRATION_BINS = 15  # of the calibration error, whose bins the results hold

# The loss and its terms, as the trainer logs them, with their titles.
TERMS = {
    "loss": "Total loss",
    "contrastive": "Contrastive term",
    "relational": "Relational term (CRD)",
    "interactive": "Interactive term (ICL)",
    "cross": "Cross term (XKD)",
    "feature": "Feature term (FD)",
}

# Diagnostics of the loss that student and teacher both have: student/image_to_text/entropy, …
BOTH_MODELS = {
    "entropy": "Entropy of the predictions, nats",
    "confidence": "Confidence: largest probability",
    "accuracy": "Accuracy within the batch",
}

# Titles of what else the trainer logs; a quantity without a title here is shown under its own name.
OTHERS = {
    "logit_scale": "Logit scale σ",
    "lr": "Learning rate",
    "step_seconds": "Seconds per step",
    "projection_product": "Penalty ‖Wv Wtᵀ‖",
    "projection_orthogonal": "Penalty ‖WvᵀWv − I‖",
}


@dataclass(frozen=True)
class Drawn:
    """The page's figures; a list is empty, and a single figure None, where nothing was measured."""

    trade_off: Markup | None
    trials: list[Markup]  # validation score against each setting of the grid
    gap: Markup | None
    gap_block: int  # measured steps that each point of the gap is the mean of
    bars: list[Markup]
    reliability: list[Markup]  # one for each set whose bins of confidence were kept
    during: list[Markup]  # accuracy on each evaluation set, where --eval_every measured it
    terms: list[Markup]
    diagnostics: list[Markup]
    others: list[Markup]
    log_block: int  # steps that each point of a term is the mean of


def draw(results: Results) -> Drawn:
    """Draw all figures of the page."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # its stub knows no plain str keys
        return Figures(results).draw()


class Figures:
    """Draws the figures of one page: the same colour and marker for a method in each of them."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.count = 0

    def draw(self) -> Drawn:
        """Draw everything that was measured."""
        results = self.results
        gap = logged_curves(results, Run.gap)
        loss = logged_curves(results, lambda run: run.series("loss"))
        return Drawn(
            trade_off=self.trade_off(results.under_shift) if results.under_shift else None,
            trials=[self.trials(setting) for setting in self._varied()],
            gap=self.over_steps(gap, "Teacher–student KL, nats (log scale)", True, 4.0) if gap else None,
            gap_block=max((curve.block for curve in gap), default=1),
            bars=self.all_bars(),
            reliability=[self.reliability(d) for d in results.domains if self._with_bins(d)],
            during=self.logged(self.during()),
            terms=self.logged(TERMS),
            diagnostics=self.diagnostics(),
            others=self.logged(OTHERS | self.untitled()),
            log_block=max((curve.block for curve in loss), default=1),
        )

    def colour(self, method: Method) -> str:
        """Return the method's colour on a light page."""
        return COLOURS[self.results.place(method) % len(COLOURS)][0]

    def marker(self, method: Method) -> str:
        """Return the method's marker."""
        return MARKERS[self.results.place(method) % len(MARKERS)]

    def axes(self, width: float, height: float) -> Axes:
        """Return the axes of a new figure; sizes in inches, chosen so that text stays readable on a phone."""
        return Figure(figsize=(width, height), layout="constrained").add_subplot()

    def svg(self, axes: Axes, label: str) -> Markup:
        """Return the figure as an inline SVG element; ``label`` describes it to a screen reader."""
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
        for colour, name in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid"), (PAPER, "paper")):
            body = body.replace(colour, f"var(--{name})")
        for i, (light, _) in enumerate(COLOURS):
            body = body.replace(light, f"var(--m{i})")
        box = re.search(r'viewBox="([^"]*)"', text)
        assert box is not None
        body = "".join(line.strip() + "\n" for line in body.splitlines() if line.strip())
        return Markup('<svg viewBox="{}" role="img" aria-label="{}">\n').format(box[1], label) + Markup(body)

    def trade_off(self, shifted: Column) -> Markup:
        """Draw accuracy in distribution against accuracy under shift: every seed, the means, lines over α."""
        home, base = self.results.in_distribution, self.results.baseline
        ax = self.axes(4.8, 4.3)
        if base is not None:
            ax.axvline(100 * base.stat(home).mean, color=MUTED, linewidth=0.9, linestyle=":")
            ax.axhline(100 * base.stat(shifted).mean, color=MUTED, linewidth=0.9, linestyle=":")
        for curve in self.results.curves:
            self._line_over_alpha(ax, curve, shifted)
        for method in self.results.main:
            self._seeds_and_mean(ax, method, shifted)
        ax.margins(0.09)
        ax.set_xlabel(
            f"Accuracy in distribution, %\n({home.detail})"
        )  # two lines: a long one would be cut off
        ax.set_ylabel(f"Accuracy under shift, %\n({shifted.detail})")
        _legend_below(ax)
        return self.svg(ax, "Accuracy in distribution against accuracy under shift, one marker per method")

    def _line_over_alpha(self, ax: Axes, curve: Interpolation, shifted: Column) -> None:
        """Draw the means over the seeds as a line; its inner points bear their α."""
        line: dict[float, list[tuple[float, float]]] = {}
        for point in curve.points:
            xy = tuple(
                column.read(point.eval, "accuracy") for column in (self.results.in_distribution, shifted)
            )
            if all(map(math.isfinite, xy)):
                line.setdefault(point.alpha, []).append((100 * xy[0], 100 * xy[1]))
        if not line:
            return
        alphas = sorted(line)
        means = [tuple(map(statistics.fmean, zip(*line[alpha], strict=True))) for alpha in alphas]
        own = next((m for m in self.results.methods if m.key == curve.key), None)
        colour = MUTED if own is None else self.colour(own)
        ax.plot(
            *zip(*means, strict=True), color=colour, linewidth=1.6, marker="|", markersize=6, zorder=2,
            label=f"{curve.name}, α from 0 to 1" if own is None else None,
        )  # fmt: skip
        for alpha, (x, y) in list(zip(alphas, means, strict=True))[1:-1]:
            ax.annotate(amount(alpha), (x, y), xytext=(4, 5), color=colour,
                        textcoords="offset points", fontsize=8, zorder=5)  # fmt: skip

    def _seeds_and_mean(self, ax: Axes, method: Method, shifted: Column) -> None:
        columns = (self.results.in_distribution, shifted)
        pairs = [tuple(100 * c.read(run.eval, "accuracy") for c in columns) for run in method.runs]
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if not pairs:
            return
        xs, ys = zip(*pairs, strict=True)
        marker, colour = self.marker(method), self.colour(method)
        if len(pairs) > 1:
            ax.scatter(xs, ys, s=30, marker=marker, color=colour, alpha=0.55, linewidths=0, zorder=3)
        ax.scatter(
            statistics.fmean(xs), statistics.fmean(ys), s=240 if marker == "*" else 105, marker=marker,
            color=colour, edgecolors=PAPER, linewidths=1.2, zorder=4, label=method.name,
        )  # fmt: skip

    def _varied(self) -> list[str]:
        """Return the settings of which the grid has several values."""
        values: dict[str, set[float]] = {}
        for choice in self.results.choices.values():
            for trial in choice["trials"]:
                for name, value in trial["point"].items():
                    values.setdefault(name, set()).add(number(value))
        return [name for name, several in values.items() if len(several) > 1]

    def trials(self, setting: str) -> Markup:
        """Draw the best validation score at each value of a setting, a line a method; the chosen is large.

        A value at which all trials of a method diverged has no point.
        """
        ax = self.axes(4.4, 3.4)
        seen: set[float] = set()
        for m in (m for m in self.results.main if m.key in self.results.choices):
            choice, best = self.results.choices[m.key], dict[float, float]()
            for trial in choice["trials"]:
                x, y = number(trial["point"].get(setting)), 100 * number(trial["validation"])
                if math.isfinite(y):  # it did not diverge
                    best[x] = max(y, best.get(x, y))
            line = sorted(best.items())
            ax.plot(
                *zip(*line, strict=True), color=self.colour(m), marker=self.marker(m), markersize=4.5,
                linewidth=1.3, label=m.name,
            )  # fmt: skip
            x = number(choice["chosen"].get(setting))
            ax.plot(
                [x], [best[x]], color=self.colour(m), marker=self.marker(m), markersize=10,
                markeredgecolor=PAPER,
            )  # fmt: skip
            seen |= best.keys()
        if min(seen) > 0:
            ax.set_xscale("log")
        ax.set_xticks(sorted(seen), [amount(x) for x in sorted(seen)])
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(setting)
        ax.set_ylabel("Validation score, %")
        _legend_below(ax)
        return self.svg(ax, f"Validation score against {setting}, a line for each method")

    def all_bars(self) -> list[Markup]:
        """Draw one figure of bars for each domain that was measured, all over the same range."""
        columns = {domain: domain_column(domain, "") for domain in self.results.domains}
        values = [v for m in self.results.main for c in columns.values() for v in m.stat(c).values]
        values += [c.chance for c in columns.values() if math.isfinite(c.chance)]
        top = 1.18 * max(values, default=1.0) or 1.0
        return [
            self.bars(domain, column, top)
            for domain, column in columns.items()
            if any(math.isfinite(m.stat(column).mean) for m in self.results.methods)
        ]

    def bars(self, domain: Domain, column: Column, top: float) -> Markup:
        """Draw the accuracy of every method in one domain: seeds as points, baseline and chance as lines."""
        methods = [m for m in self.results.main if math.isfinite(m.stat(column).mean)]
        ax = self.axes(4.4, 0.85 + 0.32 * len(methods))
        for y, m in enumerate(methods):
            stat = m.stat(column)
            ax.barh(y, 100 * stat.mean, height=0.66, color=self.colour(m), alpha=0.85)
            if len(stat.values) > 1:
                ax.plot([100 * v for v in stat.values], [y] * len(stat.values), "o", markersize=4, color=INK,
                        markeredgecolor=PAPER, markeredgewidth=0.7)  # fmt: skip
            ax.annotate(percent(stat.mean), (100 * max(stat.values), y), xytext=(7, 0), va="center",
                        textcoords="offset points", fontsize=9.5, zorder=5,
                        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6})  # fmt: skip
        base = self.results.baseline
        if base is not None and math.isfinite(base.stat(column).mean):
            ax.axvline(100 * base.stat(column).mean, color=INK, linewidth=1, linestyle=":")
        if math.isfinite(domain.chance):
            ax.axvline(100 * domain.chance, color=MUTED, linewidth=1)
        ax.set_yticks(range(len(methods)), [m.name for m in methods])
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set_xlim(0, 100 * top)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_xlabel("Accuracy, %")
        mark = ", incomplete" if domain.mark else ""
        ax.set_title(f"{domain.name} ({domain.role.replace('-', ' ')}{mark})")
        return self.svg(ax, f"Accuracy on {domain.name} by method")

    def _with_bins(self, domain: Domain) -> list[Method]:
        return [m for m in self.results.main if any(run.reliability.get(domain.name) for run in m.runs)]

    def reliability(self, domain: Domain) -> Markup:
        """Draw the accuracy of each bin of confidence against its mean confidence, with the pictures of all seeds.

        A bin that holds less than one picture in a hundred is left out: its accuracy says nothing.
        """
        ax, methods = self.axes(4.4, 4.4), self._with_bins(domain)
        ax.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=":")
        for m in methods:
            bins = [b for run in m.runs for b in run.reliability.get(domain.name, ())]
            total = sum(b["pictures"] for b in bins)
            points = []
            for n in range(CALIBRATION_BINS):
                own = [
                    b for b in bins if min(int(b["confidence"] * CALIBRATION_BINS), CALIBRATION_BINS - 1) == n
                ]
                weight = sum(b["pictures"] for b in own)
                if weight and weight >= 0.01 * total:
                    means = (
                        100 * sum(b["pictures"] * b[key] for b in own) / weight
                        for key in ("confidence", "accuracy")
                    )
                    points.append(tuple(means))
            ax.plot(
                *zip(*points, strict=True), color=self.colour(m), marker=self.marker(m), markersize=4.5,
                linewidth=1.3, label=m.name,
            )  # fmt: skip
        ax.set_xlim(0, 100)
        ax.set_ylim(0, 100)
        ax.set_xlabel("Confidence, %")
        ax.set_ylabel("Accuracy, %")
        ax.set_title(f"{domain.name} ({domain.role.replace('-', ' ')})")
        _legend_below(ax)
        return self.svg(
            ax, f"Reliability on {domain.name}: accuracy against confidence, a line for each method"
        )

    def over_steps(
        self, curves: Sequence[LoggedCurve], title: str, log: bool = False, height: float = 2.7
    ) -> Markup:
        """Draw a quantity over the steps: its mean over the seeds as a line, smallest to largest as a band."""
        ax = self.axes(4.4, height)
        # a log axis cannot show 0: the line pauses there, and the band reaches down to the smallest mean
        shown = [v for c in curves for v in c.mean if v > 0 or not log]
        for c in curves:
            mean = [v if v > 0 or not log else math.nan for v in c.mean]
            low = [max(v, min(shown)) if log else v for v in c.low]
            high = [max(v, min(shown)) if log else v for v in c.high]
            colour, dash = self.colour(c.method), DASHES[self.results.place(c.method) % len(DASHES)]
            marker = self.marker(c.method) if len(c.steps) <= 15 else None
            ax.plot(
                c.steps, mean, color=colour, linestyle=dash, label=c.method.name, marker=marker, markersize=5
            )
            if len(c.steps) > 1 and c.low != c.high:
                ax.fill_between(c.steps, low, high, color=colour, alpha=0.18, linewidth=0)
        if log:
            ax.set_yscale("log")
            narrow = max(shown) < 300 * min(shown)
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
            ax.yaxis.set_major_formatter(lambda v, _: amount(v))
            ax.yaxis.set_minor_formatter(NullFormatter())
        else:
            ax.yaxis.set_major_locator(MaxNLocator(6))
        _label_steps(ax, title)
        _legend_below(ax)
        return self.svg(ax, f"{title} over the steps: {listing([c.method.name for c in curves])}")

    def logged(self, titles: dict[str, str]) -> list[Markup]:
        """Draw one figure for each of the keys in ``titles`` that was logged."""
        drawn = []
        for key, title in titles.items():
            if curves := logged_curves(self.results, lambda run, key=key: run.series(key)):  # type: ignore[misc]
                drawn.append(self.over_steps(curves, title))
        return drawn

    def during(self) -> dict[str, str]:
        """Return key → title of the accuracies that were measured during the training."""
        keys = {
            key: key.split("/") for m in self.results.main for run in m.runs for row in run.log for key in row
        }
        named = {key: parts for key, parts in keys.items() if parts[0] == "eval" and parts[-1] == "accuracy"}
        return {key: f"Accuracy of the {parts[1]} on {parts[2]}" for key, parts in sorted(named.items())}

    def untitled(self) -> dict[str, str]:
        """Return key → key of what was logged and is shown nowhere else."""
        keys = {key for m in self.results.main for run in m.runs for row in run.log for key in row}
        keys -= {"step", "kl", *TERMS, *OTHERS, *self.during()}
        return {key: key for key in sorted(keys) if not key.startswith(("student/", "teacher/", "pair/"))}

    def diagnostics(self) -> list[Markup]:
        """Draw the loss's own diagnostics, each the mean of both directions: student against teacher."""
        drawn = []
        for name, title in BOTH_MODELS.items():
            student, teacher = (
                self._both_directions(f"{model}/{{}}/{name}") for model in ("student", "teacher")
            )
            if student:
                drawn.append(self.student_and_teacher(student, teacher, title))
        if agreement := self._both_directions("pair/{}/agreement"):
            drawn.append(self.over_steps(agreement, "Agreement: share of equal predictions"))
        return drawn

    def _both_directions(self, key: str) -> list[LoggedCurve]:
        keys = [key.format(direction) for direction in DIRECTIONS]
        return logged_curves(self.results, lambda run: run.series(*keys))

    def student_and_teacher(
        self, student: Sequence[LoggedCurve], teacher: Sequence[LoggedCurve], title: str
    ) -> Markup:
        """Draw the students' means as solid lines and their teachers' as dashed lines of the same colour."""
        ax = self.axes(4.4, 3.0)
        for curves, dash in ((student, "-"), (teacher, (0, (3, 1.5)))):
            for c in curves:
                ax.plot(
                    c.steps, c.mean, color=self.colour(c.method), linestyle=dash, linewidth=1.5,
                    marker=self.marker(c.method), markersize=4, markevery=max(1, len(c.steps) // 6),
                    label=c.method.name if dash == "-" else None,
                )  # fmt: skip
        ax.yaxis.set_major_locator(MaxNLocator(6))
        _label_steps(ax, title)
        roles = [Line2D([], [], color=INK, linestyle=dash) for dash in ("-", (0, (3, 1.5)))]
        _legend_below(ax, dict(zip(("student", "its teacher"), roles, strict=True)) if teacher else {})
        return self.svg(ax, f"{title} over the steps: {listing([c.method.name for c in student])}")


def _label_steps(ax: Axes, title: str) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("Step")
    ax.set_title(title)


def _legend_below(ax: Axes, more: dict[str, Line2D] | None = None) -> None:
    handles, labels = ax.get_legend_handles_labels()
    handles, labels = [*handles, *(more or {}).values()], [*labels, *(more or {})]
    if handles:
        ax.get_figure(root=True).legend(handles, labels, loc="outside lower left", ncols=2)  # type: ignore[union-attr]
