"""Decode, crop, resize and normalise one picture on the CPU: JPEG by torchvision, PNG by PIL, resized by torch."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from tracer.data.header import PNG
from tracer.data.picture import Picture, decode_scaled, reason_of, resized, scale_of, what_pil_says
from tracer.data.png import inflated, unfiltered
from tracer.data.window import (
    WHOLE,
    Window,
    centre_window,
    margins,
    pixels_of,
    random_pixels,
    resized_shape,
    window_of,
)
from tracer.errors import UserError
from tracer.models.picture_format import PictureFormat

OBLONG = 4  # a picture of this ratio or more is resized by its window alone, by PIL


def exact(picture: Picture, exif: bool) -> np.ndarray:
    """Return the RGB levels of a picture, [height, width, 3] uint8, whole.

    Raises:
        UserError: the decoder refuses it.
    """
    if picture.content is None:
        if picture.transparent is not None:
            return np.array(picture.transparent.convert("RGBA").convert("RGB"))
        assert picture.pixels is not None
        return picture.pixels
    try:
        if picture.content[:8] == PNG:  # torchvision 0.29 writes outside its memory where a PNG is damaged
            if (small := inflated(picture.content)) is not None:
                return unfiltered([small])[0]
            image = Image.open(io.BytesIO(picture.content))
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        content = torch.frombuffer(bytearray(picture.content), dtype=torch.uint8)
        levels = decode_image(content, ImageReadMode.RGB, apply_exif_orientation=exif)
        return levels.numpy().transpose(1, 2, 0)
    except Exception as error:  # whatever a decoder raises for a damaged picture must not end a run
        raise UserError(what_pil_says(picture.content) or reason_of(error)) from error


def training(
    picture: Picture, crop: tuple[np.ndarray, ...], wanted: PictureFormat, exif: bool, scaled: bool
) -> np.ndarray:
    """Return a random crop of a picture, [3, S, S] uint8: cut out, then resized, as torchvision does."""
    top, left, height, width = pixels = random_pixels(picture.shape, *crop)
    if picture.transparent is not None or scaled:
        window = window_of(picture.shape, pixels)
        if picture.transparent is not None:
            return resized(picture.transparent, window, wanted).transpose(2, 0, 1)
        levels = _levels(picture, window, wanted, exif, scaled)
        top, left, height, width = pixels_of((levels.shape[0], levels.shape[1]), window)
    else:
        levels = exact(picture, exif)
    return _resize(levels[top : top + height, left : left + width], (wanted.size, wanted.size), wanted)


def evaluation(picture: Picture, wanted: PictureFormat, exif: bool, scaled: bool) -> np.ndarray:
    """Return what open_clip's transform for evaluation shows of a picture, [3, S, S] uint8."""
    window = centre_window(picture.shape, wanted)
    if picture.transparent is not None:
        return resized(picture.transparent, window, wanted).transpose(2, 0, 1)
    levels = _levels(picture, window, wanted, exif, scaled)
    if max(picture.shape) >= OBLONG * min(picture.shape):
        return resized(Image.fromarray(levels), window, wanted).transpose(2, 0, 1)
    shape = resized_shape(picture.shape, wanted)
    small = _resize(levels, shape, wanted)
    if window is WHOLE:
        return small
    top, left = margins(shape, wanted)
    return small[:, top : top + wanted.size, left : left + wanted.size]


def _levels(picture: Picture, window: Window, wanted: PictureFormat, exif: bool, scaled: bool) -> np.ndarray:
    """Return a picture's levels, of a JPEG at a fraction of its size if that is allowed and enough."""
    if scaled and picture.content is not None and picture.content[:2] == b"\xff\xd8":
        scale = scale_of(picture.shape, window, wanted)
        if scale > 1:
            try:
                return decode_scaled(picture.content, scale, exif)
            except Exception as error:  # malformed EXIF raises several kinds
                raise UserError(reason_of(error)) from error
    return exact(picture, exif)


def _resize(levels: np.ndarray, shape: tuple[int, int], wanted: PictureFormat) -> np.ndarray:
    """Resize bytes [height, width, 3] to bytes [3, *shape].

    Bytes that belong to PIL are copied, as torch would do with a crop of them.
    torch's own kernel for this is Pillow-SIMD's and rounds as PIL does. All views are NumPy's, which cost a small
    picture a third less than torch's.
    """
    planes = (levels if levels.flags.writeable else levels.copy()).transpose(2, 0, 1)
    if planes.shape[1:] == shape:
        return planes
    small = F.interpolate(
        torch.from_numpy(planes[None]), shape, mode=wanted.interpolation, align_corners=False, antialias=True
    )
    return small.numpy()[0]


class Normalise:
    """Writes pictures' levels [3, S, S], from 0 to 255, into a float32 batch, normalised as ``wanted`` says.

    NumPy does it in the calling thread. torch would start threads of its own beside those of the loader.
    """

    def __init__(self, wanted: PictureFormat) -> None:
        std = np.array(wanted.std, np.float32)[:, None, None]
        self._scale = 1 / (255 * std)
        self._shift = -np.array(wanted.mean, np.float32)[:, None, None] / std

    def __call__(self, levels: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Write n pictures into ``out`` [n, 3, S, S]."""
        np.multiply(levels[0] if len(levels) == 1 else np.stack(levels), self._scale, out=out)
        out += self._shift
