"""The window of a picture that becomes the model's square: a random crop, or the centre of the resized picture."""

from __future__ import annotations

import math
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
    """Return the random crop of a picture of ``shape`` as a window; see :func:`random_pixels`."""
    return window_of(shape, random_pixels(shape, sides, place))


def random_pixels(shape: tuple[int, int], sides: np.ndarray, place: np.ndarray) -> tuple[int, int, int, int]:
    """Return the random crop of a picture of ``shape`` in whole pixels: top, left, height and width.

    The crop is the first attempt that fits the picture, and where none does, as much of the picture as RATIO
    allows. This is the distribution of torchvision's RandomResizedCrop, except that torchvision centres a crop of
    the second kind. The edges lie between pixels, so that every decoder can cut out the same ones.

    Args:
        shape: height and width of the picture, in pixels.
        sides: [2, ATTEMPTS], and
        place: [2], one picture's part of :class:`~tracer.data.order.Crops`.
    """
    assert sides.shape == (2, ATTEMPTS)
    height, width = shape
    # Python's numbers: NumPy's take several times as long where they are so few.
    area_side = math.sqrt(height * width)  # of the square that has the picture's area
    tall, wide = area_side / height, area_side / width
    for high, broad in zip(*sides.tolist(), strict=True):
        share_high, share_broad = high * tall, broad * wide
        if share_high <= 1 and share_broad <= 1:
            break
    else:
        share_high = min(RATIO * tall * tall, 1.0)
        share_broad = min(RATIO * wide * wide, 1.0)
    rows = min(max(round(share_high * height), 1), height)
    columns = min(max(round(share_broad * width), 1), width)
    down, across = place.tolist()
    return round(down * (height - rows)), round(across * (width - columns)), rows, columns


def window_of(shape: tuple[int, int], pixels: tuple[int, int, int, int]) -> Window:
    """Return top, left, height and width in a picture of ``shape`` as a window."""
    (height, width), (top, left, rows, columns) = shape, pixels
    start, end = (top / height, left / width), ((top + rows) / height, (left + columns) / width)
    return Window(np.array(start, np.float32), np.array(end, np.float32))


def pixels_of(shape: tuple[int, int], window: Window) -> tuple[int, int, int, int]:
    """Return the window in whole pixels of a picture of ``shape``: top, left, height, width, each side ≥ 1."""
    (top, left), (bottom, right) = (
        (round(down * shape[0]), round(across * shape[1]))
        for down, across in (window.start.tolist(), window.end.tolist())
    )
    top, left = min(top, shape[0] - 1), min(left, shape[1] - 1)
    return top, left, max(bottom - top, 1), max(right - left, 1)


def resized_shape(shape: tuple[int, int], wanted: PictureFormat) -> tuple[int, int]:
    """Return height and width of the whole picture as open_clip's transform for evaluation resizes it.

    For ``shortest``, torchvision resizes the shorter side to the model's size and the longer one in proportion,
    rounded down.
    """
    if wanted.resize_mode == "squash":
        return wanted.size, wanted.size
    height, width = (wanted.size * side // min(shape) for side in shape)
    return height, width


def margins(resized: tuple[int, int], wanted: PictureFormat) -> tuple[int, int]:
    """Return how far above and left of the centre torchvision's CenterCrop begins: rounded half to even."""
    return round((resized[0] - wanted.size) / 2.0), round((resized[1] - wanted.size) / 2.0)


def centre_window(shape: tuple[int, int], wanted: PictureFormat) -> Window:
    """Return the part of a picture of ``shape`` (height, width) that open_clip's transform for evaluation shows.

    That is all of it for ``squash``. For ``shortest`` it is the centre of the resized picture, carried back to
    the original one. So no picture is ever resized as a whole where that would be costly: an oblong one
    (20000×2) costs no more than a square one.
    """
    if wanted.resize_mode == "squash":
        return WHOLE
    resized = resized_shape(shape, wanted)
    start = np.array([margin / side for margin, side in zip(margins(resized, wanted), resized, strict=True)])
    size = np.array([wanted.size / side for side in resized])
    return Window(start.astype(np.float32), (start + size).astype(np.float32))
