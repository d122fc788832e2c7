"""One picture, read as open_clip reads it, with the exceptions below; both loaders start from here.

open_clip resizes a picture in the mode of its file and converts it to RGB afterwards. Here it is RGB, or RGBa if
transparent, before it is resized, which differs for these files:

- a palette or 1 bit a pixel: resized with interpolation, where PIL, and so open_clip, takes the nearest pixel;
- a transparent colour (PNG's tRNS): transparent, where open_clip shows it;
- 16 bits of gray: scaled to 8 bits, where PIL's conversion clips them to 255.

The orientation in EXIF is ignored as in open_clip, unless the caller asks for it. JPEG and plain PNG go to the
loader's own decoder: PIL, torchvision and DALI agree on them. PIL decodes everything else, an animation's first
picture included. Only transparent pictures are also resized here, because that takes their colours and their
alpha together.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tracer.data.config import MAX_PIXELS
from tracer.data.header import ends_well, read_header
from tracer.data.window import WHOLE, Window, pixels_of
from tracer.errors import UserError
from tracer.models.picture_format import PictureFormat

SCALES = (8, 4, 2)  # the fractions of its size at which libjpeg decodes


class UndecodableError(UserError):
    """A picture that cannot be used; ``reason`` says why, ``row`` is its number in the index, if known."""

    def __init__(self, name: object, reason: str, row: int = -1):
        super().__init__(f"'{name}' cannot be decoded ({reason}): repair it, or remove it and its row")
        self.reason, self.row = reason, row


@dataclass
class Picture:
    """A picture before it is cropped and resized. Exactly one of the last three attributes is not None.

    Attributes:
        shape: height and width in pixels, turned upright if asked for.
        content: bytes of a file that every decoder reads to the same levels.
        pixels: what PIL has decoded, [height, width, 3] uint8.
        transparent: a picture with alpha, decoded and multiplied by it (PIL's mode RGBa).
    """

    shape: tuple[int, int]
    content: bytes | None = None
    pixels: np.ndarray | None = None
    transparent: Image.Image | None = None


def read_picture(
    content: bytes, name: object, *, exif: bool = False, max_pixels: int = MAX_PIXELS
) -> Picture:
    """Read a picture from the bytes of its file; decode it only if the loaders' decoders would not agree on it.

    Args:
        content: the file.
        name: what an error calls it.
        exif: turn it upright as EXIF says.
        max_pixels: a picture of more pixels is refused before anything is decoded.

    Raises:
        UndecodableError: the file is not a picture, is damaged, is too large, or holds numbers whose range is not
            known. Damage in a file that the loader decodes is not noticed here.
    """
    try:
        if not content:
            raise UserError("it is empty")
        header = read_header(content)
        if header is not None:
            check_pixels(header.height, header.width, max_pixels)
            if header.plain and ends_well(header.format, content):
                turned = exif and header.orientation >= 5
                # PNG's EXIF is one of the things that PIL alone reads, so it is not plain.
                shape = (header.width, header.height) if turned else (header.height, header.width)
                return Picture(shape, content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # --max_pixels is the limit here
            with Image.open(io.BytesIO(content)) as image:
                check_pixels(image.height, image.width, max_pixels)
                return _decoded(image, content, exif)
    except MemoryError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more for damaged files
        raise UndecodableError(name, reason_of(error)) from error


def without_border(picture: Picture, border: int, name: object, *, exif: bool = False) -> Picture:
    """Return a picture without so many pixels on each side; PIL decodes it, unless nothing is cut off.

    Raises:
        UndecodableError: the picture is damaged, or nothing would be left of it.
    """
    if not border:
        return picture
    height, width = picture.shape
    if min(height, width) <= 2 * border:
        raise UndecodableError(name, f"nothing of its {width}×{height} pixels is left without its border")
    inside = (border, border, width - border, height - border)
    shape = (height - 2 * border, width - 2 * border)
    if picture.transparent is not None:
        return Picture(shape, transparent=picture.transparent.crop(inside))
    pixels = picture.pixels
    if picture.content is not None:
        try:
            with Image.open(io.BytesIO(picture.content)) as image:
                upright = ImageOps.exif_transpose(image) if exif else image
                pixels = np.array(upright.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise UndecodableError(name, reason_of(error)) from error
    assert pixels is not None
    return Picture(shape, pixels=pixels[border:-border, border:-border].copy())


def check_pixels(height: int, width: int, most: int) -> None:
    """Raise UserError for a picture of more than ``most`` pixels, which nothing must decode."""
    if height * width > most:
        raise UserError(
            f"it has {width}×{height} pixels, more than --max_pixels {most}: scale it down, or raise --max_pixels"
        )


def reason_of(error: Exception) -> str:
    """Return in words, on one line, why a picture could not be read."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "its content is not a picture"
    if isinstance(error, Image.DecompressionBombError):
        return "it has more pixels than PIL allows: scale it down"
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join((str(error) or type(error).__name__).split())[:300]


def what_pil_says(content: bytes) -> str | None:
    """Return why PIL cannot decode a file, or None if it can."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except Exception as error:
        return reason_of(error)
    return None


def _decoded(image: Image.Image, content: bytes, exif: bool) -> Picture:
    """Return the picture as plain RGB or with its alpha."""
    scaled_by_pil = image.mode == "I" and image.format == "PPM"  # more than 8 bits, which PIL scales to 16
    if image.mode in ("I", "F") and not scaled_by_pil:
        raise UserError("it holds 32-bit numbers, whose black and white are not known: save it with 8 bits")
    if image.format == "PNG" and "transparency" in image.info:
        _set_key(image, content)
    if exif:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or scaled_by_pil:  # PIL would clip these numbers to 255
        image = _eight_bits(image)
    shape = (image.height, image.width)
    if image.has_transparency_data:
        return Picture(shape, transparent=image.convert("RGBA").convert("RGBa"))
    return Picture(shape, pixels=np.array(image.convert("RGB")))


def _set_key(image: Any, content: bytes) -> None:
    """Make the pixels of a PNG transparent that have the colour of its tRNS, where PIL would take others.

    PIL reads gray of 2 and 4 bits and colours of 16 bits as 8 bits, but compares them with tRNS's own number.
    """
    layout, key = image.tile[0].args, image.info["transparency"]
    if layout in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if layout == "L;2" else 17)
    elif layout == "RGB;16B":  # of which PIL keeps the upper bytes
        with Image.open(io.BytesIO(content)) as lower:
            lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]  # type: ignore[attr-defined]
            levels = np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
        opaque = np.where((levels == key).all(2), 0, 255).astype(np.uint8)
        image.putalpha(Image.fromarray(opaque))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a gray picture of 16 bits with 8 bits, and with alpha where one of its levels is transparent."""
    levels, key = np.asarray(image), image.info.get("transparency")
    gray = Image.fromarray((levels.astype(np.float32) / 257 + 0.5).astype(np.uint8))
    if key is None:
        return gray
    return Image.merge("LA", (gray, Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))))


def ppm(pixels: np.ndarray) -> np.ndarray:
    """Return RGB pixels [height, width, 3] as the bytes of a PPM file, which costs no compression."""
    header = f"P6 {pixels.shape[1]} {pixels.shape[0]} 255\n".encode()
    return np.frombuffer(header + pixels.tobytes(), np.uint8)


def resized(picture: Image.Image, window: Window, wanted: PictureFormat) -> np.ndarray:
    """Return the window of a picture, resized by PIL to the model's size, as RGB [S, S, 3] uint8.

    The rule for transparency is that of PIL's resizing, and so of open_clip's transforms: a pixel counts as much
    as it is opaque, the colours hidden under alpha 0 do not count at all, and a place without any opaque pixel is
    black.

    Args:
        picture: in PIL's mode RGB, or RGBa, colours multiplied by alpha.
        window: the part to show.
        wanted: size and interpolation.
    """
    size = np.array([picture.height, picture.width])
    (top, left), (bottom, right) = ((corner.astype(float) * size) for corner in window)
    kernel = Image.Resampling[wanted.interpolation.upper()]
    box = (max(left, 0), max(top, 0), min(right, picture.width), min(bottom, picture.height))
    small = picture.resize((wanted.size, wanted.size), kernel, box=box)
    return np.array((small.convert("RGBA") if small.mode == "RGBa" else small).convert("RGB"))


def for_dali(picture: Picture, window: Window, wanted: PictureFormat) -> tuple[np.ndarray, Window]:
    """Return the bytes that DALI decodes, and the window that it then resizes to the model's square."""
    if picture.transparent is not None:
        return ppm(resized(picture.transparent, window, wanted)), WHOLE
    if picture.pixels is not None:
        return ppm(picture.pixels), window
    assert picture.content is not None
    return np.frombuffer(picture.content, np.uint8), window


def scale_of(shape: tuple[int, int], window: Window, wanted: PictureFormat) -> int:
    """Return by how much a JPEG may be decoded smaller so that its window stays twice the model's size."""
    _, _, height, width = pixels_of(shape, window)
    return next((s for s in SCALES if min(height, width) >= 2 * s * wanted.size), 1)


def decode_scaled(content: bytes, scale: int, exif: bool) -> np.ndarray:
    """Return a JPEG decoded by libjpeg at 1/``scale`` of its size, rounded up, [height, width, 3] uint8."""
    with Image.open(io.BytesIO(content)) as image:
        # Rounded down: PIL takes the largest scale that leaves at least so many pixels.
        image.draft("RGB", (image.width // scale, image.height // scale))
        upright = ImageOps.exif_transpose(image) if exif else image
        return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
