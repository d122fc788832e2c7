"""Figures of the report, as SVG."""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from tracer.report.results import BLOCKS, Column, Curve, Method, Summary, curves_of, gap_of, number
from tracer.report.sentences import amount, listing, percent

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
