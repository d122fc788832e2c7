"""One picture file, handed to DALI so that DALI reads it as PIL and open_clip do, with four exceptions.

open_clip resizes a picture in the mode of its file and converts it to RGB afterwards. Here it is RGB, or RGBa if
transparent, before it is resized, which differs for these files:

- a palette or 1 bit a pixel: resized with interpolation, where PIL, and so open_clip, takes the nearest pixel;
- a transparent colour (PNG's tRNS): transparent, where open_clip shows it;
- 16 bits of gray: scaled to 8 bits, where PIL's conversion clips them to 255;
- EXIF that says how the camera was turned: the picture is turned upright, where open_clip leaves it as stored.

DALI and PIL agree on most files, and DALI reads these by itself. PIL reads the others and hands over plain RGB.
Only transparent pictures are also resized here, because that takes their colours and their alpha together.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tracer.data.window import WHOLE, Window
from tracer.errors import UserError
from tracer.models.picture_format import PictureFormat

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")  # what both PIL and DALI decode
ORIENTATION = 0x0112  # EXIF: how the camera was turned; from 5 on, height and width change places
PLAIN_TIFF = {"raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"}  # compressions that DALI's libtiff has


class UndecodableError(UserError):
    """A picture file that cannot be used; ``reason`` says why."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"'{path}' cannot be decoded ({reason}): repair it, or remove it and its row")
        self.reason = reason


@dataclass
class Picture:
    """A picture before it is cropped and resized.

    Attributes:
        shape: height and width in pixels, upright.
        encoded: bytes of a file that DALI decodes to the right pixels, [n] uint8; None if transparent.
        transparent: a picture with alpha, decoded and multiplied by it (PIL's mode RGBa); None if opaque.
        decoded: whether PIL has decoded the picture already, so that it is known to be whole.
    """

    shape: tuple[int, int]
    encoded: np.ndarray | None
    transparent: Image.Image | None = None
    decoded: bool = False


def read_picture(path: Path) -> Picture:
    """Read a picture file; decode it only if DALI would not read it rightly.

    Raises:
        UndecodableError: the file is not a picture of a supported format, is damaged, is too large, or holds
            numbers whose range is not known; the message names it. Damage in a file that DALI decodes by itself
            is not noticed here.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format not in FORMATS:
                raise UserError(f"{image.format} is not supported, use {', '.join(sorted(FORMATS))}")
            if _dali_agrees(image):
                shape = image.size[::-1] if _is_turned(image) else image.size
                return Picture((shape[1], shape[0]), np.frombuffer(content, np.uint8))
            return _decoded(image)
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more for damaged files
        raise UndecodableError(path, _reason(error)) from error


def what_pil_says(path: Path) -> str | None:
    """Return why PIL cannot decode a file, or None if it can."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"its content is not a picture; use {', '.join(sorted(FORMATS))}"
    if isinstance(error, Image.DecompressionBombError):
        return "it has more pixels than PIL allows: scale it down"
    return str(error) or type(error).__name__


def _dali_agrees(image: Image.Image) -> bool:
    """Return whether DALI decodes a file to the pixels that PIL gives, up to a level (measured in the tests)."""
    if image.format in ("JPEG", "MPO"):
        return True
    if image.has_transparency_data or "exif" in image.info or getattr(image, "is_animated", False):
        return False
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = {8} == set(tags.get(258, (1,)))
        upright = all(tags.get(tag, 1) == 1 for tag in (266, 274, 284))  # bit order, orientation, planes
        plain = image.info.get("compression") in PLAIN_TIFF and tags.get(262) in (1, 2)
        return image.mode in ("L", "RGB") and bits and upright and plain
    return image.format in ("PNG", "WEBP")


def _is_turned(image: Image.Image) -> bool:
    """Return whether EXIF says that height and width change places, as DALI understands it."""
    if "exif" not in image.info:
        return False
    exif = Image.Exif()
    exif.load(image.info["exif"])
    return exif.get(ORIENTATION, 1) >= 5


def _decoded(image: Image.Image) -> Picture:
    """Return the picture, upright, as plain RGB or with its alpha."""
    scaled_by_pil = image.mode == "I" and image.format == "PPM"  # more than 8 bits, which PIL scales to 16
    if image.mode in ("I", "F") and not scaled_by_pil:
        raise UserError("it holds 32-bit numbers, whose black and white are not known: save it with 8 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or scaled_by_pil:  # PIL would clip these numbers to 255
        image = _eight_bits(image)
    shape = (image.height, image.width)
    if image.has_transparency_data:
        return Picture(shape, None, image.convert("RGBA").convert("RGBa"), decoded=True)
    return Picture(shape, _ppm(image.convert("RGB")), decoded=True)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a gray picture of 16 bits with 8 bits, and with alpha where one of its levels is transparent."""
    levels, key = np.asarray(image), image.info.get("transparency")
    gray = Image.fromarray((levels.astype(np.float32) / 257 + 0.5).astype(np.uint8))
    if key is None:
        return gray
    return Image.merge("LA", (gray, Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))))


def _ppm(image: Image.Image) -> np.ndarray:
    """Return an RGB picture as the bytes of a PPM file, which costs no compression."""
    header = f"P6 {image.width} {image.height} 255\n".encode()
    return np.frombuffer(header + image.tobytes(), np.uint8)


def resized_on_black(picture: Image.Image, window: Window, wanted: PictureFormat) -> np.ndarray:
    """Return the window of a transparent picture, resized to the model's size, as the bytes of a PPM file.

    The rule for transparency is that of PIL's resizing, and so of open_clip's transforms: a pixel counts as much
    as it is opaque, the colours hidden under alpha 0 do not count at all, and a place without any opaque pixel is
    black.

    Args:
        picture: in PIL's mode RGBa, colours multiplied by alpha.
        window: the part to show.
        wanted: size and interpolation.
    """
    size = np.array([picture.height, picture.width])
    (top, left), (bottom, right) = ((corner.astype(float) * size) for corner in window)
    kernel = Image.Resampling[wanted.interpolation.upper()]
    box = (max(left, 0), max(top, 0), min(right, picture.width), min(bottom, picture.height))
    resized = picture.resize((wanted.size, wanted.size), kernel, box=box)
    return _ppm(resized.convert("RGBA").convert("RGB"))


def for_dali(picture: Picture, window: Window, wanted: PictureFormat) -> tuple[np.ndarray, Window]:
    """Return the bytes that DALI decodes, and the window that it then resizes to the model's square."""
    if picture.transparent is not None:
        return resized_on_black(picture.transparent, window, wanted), WHOLE
    assert picture.encoded is not None
    return picture.encoded, window
