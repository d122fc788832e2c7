"""Random changes of a picture in the loader's threads: mirroring, brightness, contrast and saturation."""

from __future__ import annotations

import numpy as np

GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in torchvision's adjust_contrast and adjust_saturation


def changed(levels: np.ndarray, flipped: bool, factors: np.ndarray | None) -> np.ndarray:
    """Return levels [3, S, S] uint8 mirrored left to right, and with other colours as float32 from 0 to 255.

    The colours follow torchvision's ``adjust_brightness``, ``adjust_contrast`` and ``adjust_saturation``, in this
    order: each blends the picture with black, its mean gray or its gray, and clamps the result. Nothing is rounded
    in between.

    Args:
        levels: of the picture.
        flipped: whether it is mirrored.
        factors: of brightness, contrast and saturation [3] float32, or None.
    """
    if flipped:
        levels = levels[:, :, ::-1]
    if factors is None:
        return levels
    brightness, contrast, saturation = factors
    weights = np.array(GRAY, np.float32)[:, None, None]
    changed = np.minimum(levels * brightness, np.float32(255))
    gray = (changed * weights).sum(0).mean()
    changed = (contrast * changed + (1 - contrast) * gray).clip(0, 255)
    gray = (changed * weights).sum(0)
    return (saturation * changed + (1 - saturation) * gray).clip(0, 255)
