"""Random changes of a batch of pictures after either loader: mirroring, brightness, contrast and saturation."""

from __future__ import annotations

import torch
from torch import Tensor

from tracer.data.order import Changes
from tracer.models.picture_format import PictureFormat

GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in torchvision's adjust_contrast and adjust_saturation


def change(image: Tensor, drawn: Changes, wanted: PictureFormat, *, flip: bool, jitter: bool) -> Tensor:
    """Return normalised pictures [n, 3, S, S] changed by the numbers drawn for them.

    The colours follow torchvision's ``adjust_brightness``, ``adjust_contrast`` and ``adjust_saturation``, in this
    order: each blends the picture with black, its mean gray or its gray, and clamps the result to [0, 1].
    """
    device = image.device
    if flip:
        flipped = torch.from_numpy(drawn.flipped).to(device)
        image = torch.where(flipped[:, None, None, None], image.flip(-1), image)
    if not jitter:
        return image
    mean, std, weights = (
        torch.tensor(values, device=device).view(3, 1, 1) for values in (wanted.mean, wanted.std, GRAY)
    )
    brightness, contrast, saturation = torch.from_numpy(drawn.factors).to(device).T[:, :, None, None, None]
    level = ((image * std + mean).clamp(0, 1) * brightness).clamp(0, 1)
    gray = (level * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    level = (contrast * level + (1 - contrast) * gray).clamp(0, 1)
    gray = (level * weights).sum(1, keepdim=True)
    level = (saturation * level + (1 - saturation) * gray).clamp(0, 1)
    return (level - mean) / std
