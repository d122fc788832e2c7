"""Colours, markers and dashes of every figure: the one palette of the report's pages and of the benchmarks.

Each colour is a pair: its value on a light page and on a dark page, as CSS hexadecimals.
"""

from __future__ import annotations

from typing import Any

# One colour for each method or curve, by its position; a longer list starts again at the first.
# Tuned from Okabe and Ito's set (https://jfly.uni-koeln.de/color/), which colour-blind readers tell apart.
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

# By the same positions: matplotlib's markers and line styles, so that no figure relies on colour alone.
MARKERS = "*osD^vPX"
DASHES: tuple[Any, ...] = ("-", "-", (0, (5, 2)), "-", (0, (3, 1.5)), "-.", (0, (1, 1)), (0, (7, 2, 1, 2)))

# Colours of the page itself, by the name of their CSS variable.
PAGE = {
    "paper": ("#ffffff", "#191e24"),
    "page": ("#f4f6f8", "#11151a"),
    "ink": ("#1b2129", "#e7ecf1"),
    "muted": ("#5d6773", "#a3afbb"),
    "grid": ("#dde2e7", "#323a43"),
    "line": ("#d3dae1", "#3a434d"),
    "up": ("#d9ebfb", "#16314f"),
    "down": ("#fce4d0", "#4a2a10"),
    "accent": COLOURS[3],
    "good": COLOURS[4],
    "bad": ("#b23c00", "#ff9a62"),
}
