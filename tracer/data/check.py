"""The first sight of a picture: header, size and end of the file. Suspects are decoded; ``--decode`` does all.

A JPEG or PNG file with a sound header and its end marker decodes: what is damaged in between goes unnoticed by
PIL, torchvision and DALI alike. So nothing is gained by decoding it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from tracer.data.header import TAIL, Header, ends_well, read_header

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
            return Sight(header.format, fault=_too_large(header, max_pixels))
        tail = read(max(0, size - TAIL), min(size, TAIL))
        if ends_well(header.format, tail) and not whole:
            return Sight(header.format, header.orientation > 1, header.bits > 8)
    return _decoded(read(0, size), max_pixels)


def _too_large(header: Header, most: int) -> str:
    from tracer.data.picture import check_pixels, reason_of

    try:
        check_pixels(header.height, header.width, most)
    except ValueError as error:
        return reason_of(error)
    raise AssertionError


def _decoded(content: bytes, max_pixels: int) -> Sight:
    """Decode a picture with PIL, and with torchvision where that is what the loader would use."""
    import io

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
        handle = os.open(path, os.O_RDONLY)
        try:
            about = os.fstat(handle)
            sight = look(lambda place, n: os.pread(handle, n, place), about.st_size, max_pixels, whole)
            return sight, about.st_size, about.st_mtime_ns
        finally:
            os.close(handle)
    except OSError as error:
        from tracer.data.picture import reason_of

        return Sight("", fault=reason_of(error)), -1, -1
