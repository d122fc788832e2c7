"""The first sight of a picture: header, size and end of the file. Suspects are decoded; ``--decode`` does all.

A JPEG file with a sound header and its end marker decodes: what is damaged in between goes unnoticed by PIL,
torchvision and DALI alike. So nothing is gained by decoding it. In other formats a decoder may notice more, but
takes up to a thousand times as long; what it finds during a run costs a stand-in.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, cast

from tracer.data.header import TAIL, ends_well, read_header

HEAD, LONG_HEAD = 4096, 1 << 18

Read = Callable[[int, int], bytes]  # offset and length → bytes


class Sight(NamedTuple):
    """What the first sight of a picture tells: its format, what was noticed, and what is wrong, if anything."""

    format: str
    turned: bool = False
    sixteen: bool = False
    fault: str = ""


def look(read: Read, size: int, max_pixels: int, whole: bool = False) -> Sight:
    """Return the first sight of a picture.

    Args:
        read: reads a part of the picture's bytes.
        size: of the picture in bytes.
        max_pixels: a picture of more pixels is a fault, and not decoded.
        whole: decode it in any case.
    """
    if size == 0:
        return Sight("", fault="it is empty")
    head = read(0, min(size, HEAD))
    header = read_header(head)
    if header is None and size > HEAD and head[:2] == b"\xff\xd8":  # a long comment, thumbnail or profile
        head = read(0, min(size, LONG_HEAD))
        header = read_header(head)
    if header is not None:
        if header.height * header.width > max_pixels:
            return Sight(header.format, fault=_too_large(header.height, header.width, max_pixels))
        tail = read(max(0, size - TAIL), min(size, TAIL))
        if ends_well(header.format, tail) and header.length <= size and not whole:
            return Sight(header.format, header.orientation > 1, header.bits > 8)
    elif not whole and head[:2] != b"\xff\xd8" and (sight := _opened(read, size, max_pixels)) is not None:
        return sight
    return _decoded(read(0, size), max_pixels)


class _Part(io.RawIOBase):
    """A picture's bytes as a file, of which only those that are asked for are read."""

    def __init__(self, read: Read, size: int) -> None:
        self._read, self._size, self._place = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        content = self._read(self._place, max(0, min(len(buffer), self._size - self._place)))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def _opened(read: Read, size: int, max_pixels: int) -> Sight | None:
    """Return the first sight of a picture whose header PIL reads; None for suspects and formats without an end."""
    from PIL import Image

    from tracer.data.header import ORIENTATION

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, for --max_pixels is the limit, and of what is cut off
            with Image.open(cast(BinaryIO, _Part(read, size))) as image:
                kind, mode, (width, height) = image.format or "", image.mode, image.size
                if height * width > max_pixels:
                    return Sight(kind, fault=_too_large(height, width, max_pixels))
                deep = mode.startswith("I;16") or (mode == "I" and kind == "PPM")
                if (mode in ("I", "F") and not deep) or not _is_whole(image, read, size):
                    return None
                return Sight(kind, image.getexif().get(ORIENTATION, 1) > 1, deep)
    except MemoryError:
        raise
    except Exception:  # PIL raises OSError, SyntaxError, ValueError and more for damaged files
        return None


def _is_whole(image: Any, read: Read, size: int) -> bool:
    """Return whether a file holds all that its header promises; False for formats that do not tell."""
    tail = read(max(0, size - TAIL), min(size, TAIL)).rstrip(b"\0")
    if image.format == "GIF":
        return tail.endswith(b";")
    if image.format == "JPEG2000":
        return tail.endswith(b"\xff\xd9")
    if image.format == "WEBP":  # with EXIF, which lies behind the pixels
        return int.from_bytes(read(4, 4), "little") + 8 <= size
    if image.format in ("BMP", "PPM"):
        end = _end_of_rows(image)
        return end <= size if end else tail.endswith(b"\0\1")
    if image.format == "TIFF":
        places = [image.tag_v2.get(tag, ()) for tag in (273, 279)]
        if not all(places):  # no strips, but tiles
            places = [image.tag_v2.get(tag, ()) for tag in (324, 325)]
        starts, lengths = places
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        return bool(ends) and max(ends) <= size
    return image.format == "AVIF" and _boxes_end(read, size)


def _end_of_rows(image: Any) -> int:
    """Return where the rows of a BMP or PPM file end, 0 where they are compressed or written as digits."""
    codec, _, start, layout = image.tile[0]
    width, height = image.size
    if image.format == "BMP":
        return int(start + layout[1] * height) if codec == "raw" else 0
    if codec == "ppm_plain":
        return 0
    deep = layout == "I;16B" or (codec == "ppm" and layout[1] > 255)
    row = (width + 7) // 8 if image.mode == "1" else width * len(image.getbands()) * (1 + deep)
    return int(start + row * height)


def _boxes_end(read: Read, size: int) -> bool:
    """Return whether the boxes of a file of ISO's base media format (ISO/IEC 14496-12, section 4.2) end in it."""
    place = 0
    while place < size:
        head = read(place, 16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length == 0:  # to the end of the file
            return True
        if length < 8:
            return False
        place += length
    return place == size


def _too_large(height: int, width: int, most: int) -> str:
    from tracer.data.picture import check_pixels, reason_of

    try:
        check_pixels(height, width, most)
    except ValueError as error:
        return reason_of(error)
    raise AssertionError


def _decoded(content: bytes, max_pixels: int) -> Sight:
    """Decode a picture with PIL, and with torchvision where that is what the loader would use."""
    from PIL import Image

    from tracer.data.decode import exact
    from tracer.data.header import ORIENTATION
    from tracer.data.picture import UndecodableError, read_picture, reason_of

    try:
        picture = read_picture(content, "", max_pixels=max_pixels)
        exact(picture, exif=False)
    except UndecodableError as error:
        return Sight("", fault=error.reason)
    except (RuntimeError, ValueError) as error:
        return Sight("", fault=reason_of(error))
    with Image.open(io.BytesIO(content)) as image:
        deep = image.mode.startswith("I") or (image.format == "PNG" and content[24] > 8)
        return Sight(image.format or "", image.getexif().get(ORIENTATION, 1) > 1, deep)


def look_at_file(path: str, max_pixels: int, whole: bool = False) -> tuple[Sight, int, int]:
    """Return the first sight of a picture file, its size and its time of change in ns; −1 if it has none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # who opens a pipe would wait for its writer
        try:
            about = os.fstat(handle)
            sight = look(lambda place, n: os.pread(handle, n, place), about.st_size, max_pixels, whole)
            return sight, about.st_size, about.st_mtime_ns
        finally:
            os.close(handle)
    except OSError as error:
        from tracer.data.picture import reason_of

        return Sight("", fault=reason_of(error)), -1, -1
