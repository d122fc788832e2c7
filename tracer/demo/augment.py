"""Random augmentation of icons for pretraining."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tracer.demo.small_clip import PIXEL_MEAN, PIXEL_STD


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return normalised RGB [B, 3, S, S] float32, randomly placed and coloured, on paper of a random tint.

    Pictures are never mirrored: in many icons left and right carry the meaning.

    Args:
        pictures: premultiplied RGBA [B, 4, S, S] uint8.
        generator: source of all randomness.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(pictures), *shape, generator=generator)

    def sometimes(share: float) -> Tensor:
        return (uniform(0, 1, 1, 1, 1) < share).float()

    x = pictures.float() / 255
    pale = x[:, :3].mean((1, 2, 3)) > 0.78 * x[:, 3].mean((1, 2))

    # 1. turn, zoom, stretch and shift, about as much as one theme differs from another
    angle, zoom, stretch = uniform(-0.15, 0.15), uniform(-0.12, 0.25).exp(), uniform(-0.08, 0.08).exp()
    cos, sin, shift = angle.cos(), angle.sin(), uniform(-0.12, 0.12, 2)
    rows = (zoom * stretch * cos, -zoom * sin, shift[:, 0], zoom * sin, zoom / stretch * cos, shift[:, 1])
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)

    # 2. paper: as in the benchmark, or tinted; the ink can always be seen on it
    plain = torch.where(pale, 80 / 255, 1.0)[:, None].expand(-1, 3)
    tinted = torch.where(pale[:, None], uniform(0.1, 0.5, 3), uniform(0.7, 1.0, 3))
    paper = torch.where(uniform(0, 1, 1) < 0.5, plain, tinted)
    x = x[:, :3] + (1 - x[:, 3:]) * paper[:, :, None, None]

    # 3. hue (mixed with a permutation of the channels), saturation, contrast and brightness
    turned = x[:, torch.randperm(3, generator=generator)]
    x = x.lerp(turned, uniform(0, 1, 1, 1, 1) * sometimes(0.25))
    x = x.lerp(x.mean(1, keepdim=True), uniform(0, 1.4, 1, 1, 1).clamp(max=1) * sometimes(0.4))
    x = 0.5 + (x - 0.5) * uniform(0.7, 1.15, 1, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1)

    mean, std = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD)
    return (x.clamp(0, 1) - mean[:, None, None]) / std[:, None, None]
