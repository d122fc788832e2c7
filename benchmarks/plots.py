"""Draw the pictures of the benchmarks: curves, bars of two phases, and the colours that all pictures share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from tracer.report.palette import COLOURS

LIGHT = [on_light for on_light, _ in COLOURS]
OURS = LIGHT[3]  # the blue that TRACER has in the demo's report
OTHERS = (LIGHT[1], LIGHT[5], LIGHT[4], LIGHT[2], LIGHT[0])
STACKED = (LIGHT[3], LIGHT[0], LIGHT[1], LIGHT[2], LIGHT[4], LIGHT[7], LIGHT[5])  # neighbours differ clearly
OTHER, REFERENCE = "#8c8c8c", "#d9d9d9"  # bars of competitors, and of what only the memory's speed limits
TEXT = LIGHT[0]


class Panel(NamedTuple):
    """One diagram: by name the points (x, median, low, high) of each line; ``unit`` writes a value of y."""

    title: str
    ylabel: str
    lines: Mapping[str, Sequence[tuple[float, float, float, float]]]
    unit: Callable[[float], str]


def seconds(value: float) -> str:
    """Write seconds with a fitting unit: 0.012 becomes 12 ms."""
    scale, unit = (1.0, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
    return f"{value * scale:.3g} {unit}"


def mebibytes(value: float) -> str:
    """Write bytes in MiB, from 1024 MiB in GiB."""
    return f"{value / 2**20:.3g} MiB" if value < 2**30 else f"{value / 2**30:.3g} GiB"


def _colours(names: Sequence[str]) -> dict[str, str]:
    others = iter(OTHERS)
    return {name: OURS if name.startswith("ours") and "eager" not in name else next(others) for name in names}


def bare(axes: Axes) -> None:
    """Remove the frame's upper and right side."""
    axes.spines[["top", "right"]].set_visible(False)


def curves(panels: Sequence[Panel], xlabel: str) -> Figure:
    """Draw panels in rows of two, with both axes logarithmic and the name of each line at its end."""
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 3.4 * rows), layout="constrained", facecolor="white")
    grid = figure.subplots(rows, 2, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for place, (panel, axes) in enumerate(zip(panels, grid.flat, strict=False)):
        _prepare(axes, panel)
        if place >= len(panels) - 2:
            axes.set_xlabel(xlabel)
        _draw_lines(axes, panel)
    return figure


def _prepare(axes: Axes, panel: Panel) -> None:
    """Set the scales, ticks and labels of a panel."""
    bare(axes)
    axes.tick_params(labelsize=9)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2 if panel.unit is mebibytes else 10)
    axes.set_xticks(sorted({point[0] for points in panel.lines.values() for point in points}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: panel.unit(y)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_ylabel(panel.ylabel)
    if panel.title:
        axes.set_title(panel.title[0].upper() + panel.title[1:], loc="left", fontsize=11)


def _draw_lines(axes: Axes, panel: Panel) -> None:
    ends = []
    for name, colour in _colours(list(panel.lines)).items():
        x, median, low, high = zip(*panel.lines[name], strict=True)
        width = 2.6 if colour == OURS else 1.6
        axes.plot(x, median, color=colour, linewidth=width, marker="o", markersize=4)
        axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
        ends.append([x[-1], median[-1], f"{name}\n{panel.unit(median[-1])}", colour])
    right = max(end[0] for end in ends)
    left = min(point[0] for points in panel.lines.values() for point in points)
    axes.set_xlim(left / 1.15, right * (right / left) ** 0.42)  # leaves room for the names
    for (x, y, text, colour), shift in zip(ends, _apart(axes, ends), strict=True):
        axes.annotate(
            text, (x, y), xytext=(7, shift), textcoords="offset points", color=colour, fontsize=8.5,
            va="center", linespacing=1.05, bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
        )  # fmt: skip


def _apart(axes: Axes, ends: Sequence[Sequence[Any]], gap: float = 25.0) -> list[float]:
    """Return vertical offsets, in points, that keep names which would overlap at least ``gap`` apart."""
    axes.get_figure(root=True).draw_without_rendering()  # type: ignore[union-attr]
    at = [axes.transData.transform((x, y)) * 72 / axes.figure.dpi for x, y, *_ in ends]
    order = sorted(range(len(ends)), key=lambda i: at[i][1])
    wanted = {i: at[i][1] for i in order}
    for _ in range(50):
        for low, high in pairwise(order):
            overlap = gap - (wanted[high] - wanted[low])
            if overlap > 0 and abs(at[low][0] - at[high][0]) < 80:
                wanted[low] -= overlap / 2
                wanted[high] += overlap / 2
    return [wanted[i] - at[i][1] for i in range(len(ends))]


def bars(groups: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw one bar for each name of each group, in two shades: the seconds of forward and of backward."""
    rows = max(1, -(-len(groups) // 2))
    tallest = max((len(group) for group in groups.values()), default=1)
    figure = Figure(figsize=(10, rows * (0.9 + 0.32 * tallest)), layout="constrained", facecolor="white")
    grid = figure.subplots(rows, 2, squeeze=False)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    for (title, group), axes in zip(groups.items(), grid.flat, strict=False):
        bare(axes)
        axes.tick_params(labelsize=9)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_title(title[0].upper() + title[1:], loc="left", fontsize=11)
        longest = max(sum(phases) for phases in group.values())
        for y, (forward, backward) in enumerate(group.values()):
            colour = OURS if y == 0 else OTHER
            axes.barh(y, forward, color=colour, height=0.68)
            axes.barh(y, backward, left=forward, color=colour, alpha=0.55, height=0.68)
            total = seconds(forward + backward)
            axes.text(forward + backward + longest / 60, y, total, va="center", fontsize=9, color="#222222")
        axes.set_yticks(range(len(group)), list(group), fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * longest)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: seconds(x) if x else "0"))
    figure.suptitle("dark: forward, light: backward", fontsize=9, color=TEXT, x=0.99, ha="right")
    return figure
