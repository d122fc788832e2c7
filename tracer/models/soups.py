"""Model soups: weights made of the weights of several models."""

from __future__ import annotations

import torch
from torch import Tensor


def interpolate(start: dict[str, Tensor], end: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return WiSE-FT's weights (Wortsman et al. 2022, arXiv 2109.01903): (1 − α)·start + α·end.

    Args:
        start: state dict of the model before fine-tuning, with at least the entries of ``end``.
        end: state dict after fine-tuning. Floating-point entries are interpolated in float32 and returned in
            their own dtype; others (counters, indices) are taken from here as they are.
        alpha: α in [0, 1]; 0 gives ``start``, 1 gives ``end``.
    """
    return {
        name: torch.lerp(start[name].float(), value.float(), alpha).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in end.items()
    }
