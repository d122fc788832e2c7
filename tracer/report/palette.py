"""The colours, markers and dashes that every picture of the project uses."""

from __future__ import annotations

from typing import Any

# Tuned from Okabe and Ito's colour-blind-safe set; each pair is (on light paper, on dark paper).
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
