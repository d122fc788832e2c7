"""The window of a picture that becomes the model's square: a random crop, or the centre of the resized picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tracer.data.order import ATTEMPTS, RATIO
from tracer.models.picture_format import PictureFormat


class Window(NamedTuple):
    """First and last corner of a window, [2] float32 each: shares of the picture's height and width."""

    start: np.ndarray
    end: np.ndarray


WHOLE = Window(np.zeros(2, np.float32), np.ones(2, np.float32))


def random_window(shape: tuple[int, int], sides: np.ndarray, place: np.ndarray) -> Window:
    """Return the random crop of a picture of ``shape`` (height, width).

    The crop is the first attempt that fits the picture, and where none does, as much of the picture as RATIO
    allows. This is the distribution of torchvision's RandomResizedCrop, except that torchvision rounds to whole
    pixels and centres a crop of the second kind.

    Args:
        shape: height and width of the picture, in pixels.
        sides: [2, ATTEMPTS], and
        place: [2], one picture's part of :class:`~tracer.data.order.Crops`.
    """
    height, width = np.float32(shape[0]), np.float32(shape[1])
    area_side = np.sqrt(height * width)  # of the square that has the picture's area
    unit = np.array([area_side / height, area_side / width], np.float32)
    attempts = sides * unit[:, None]
    fitting = np.flatnonzero(attempts.max(0) <= 1)
    assert sides.shape == (2, ATTEMPTS)
    size = attempts[:, fitting[0]] if len(fitting) else np.minimum(np.float32(RATIO) * unit * unit, 1)
    start = place * (1 - size)
    return Window(start.astype(np.float32), (start + size).astype(np.float32))


def centre_window(shape: tuple[int, int], wanted: PictureFormat) -> Window:
    """Return the part of a picture of ``shape`` (height, width) that open_clip's transform for evaluation shows.

    That is all of it for ``squash``. For ``shortest``, torchvision resizes the shorter side to the model's size
    and the longer one in proportion, rounded down. It then cuts out the centre, with margins rounded half to
    even. The window is that square, carried back to the original picture. So no picture is ever resized as a
    whole, and an oblong one (20000×2) costs no more than a square one.
    """
    if wanted.resize_mode == "squash":
        return WHOLE
    shorter = min(shape)
    resized = [wanted.size * side // shorter for side in shape]
    margins = [round((side - wanted.size) / 2.0) for side in resized]
    start = np.array([margin / side for margin, side in zip(margins, resized, strict=True)])
    size = np.array([wanted.size / side for side in resized])
    return Window(start.astype(np.float32), (start + size).astype(np.float32))
