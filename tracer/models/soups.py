"""Weights made of weights: WiSE-FT's interpolation."""

from __future__ import annotations

import torch
from torch import Tensor


def interpolate(start: dict[str, Tensor], end: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """WiSE-FT (arXiv 2109.01903): (1 − α)·start + α·end, per floating-point entry; others from ``end``."""
    return {
        name: torch.lerp(start[name].float(), value.float(), alpha).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in end.items()
    }
