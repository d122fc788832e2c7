"""The published numbers of each method."""

from __future__ import annotations

from typing import NamedTuple


class Recipe(NamedTuple):
    """The settings whose published values differ between TRACER and R-Adapter."""

    margin: float
    smoothing: float
    lr: float
    weight_decay: float
