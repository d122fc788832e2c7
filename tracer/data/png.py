"""Small PNG files decoded faster: inflated in one piece, then unfiltered together by PIL's own decoder of rows.

PIL and libpng inflate a picture row by row, and zlib takes twice as long for pieces that are shorter than a few
hundred bytes. PIL's reader of the file adds a fifth to that. Here zlib inflates the whole, and PIL gets the rows
of several pictures as one stream without compression: the fewer calls there are, the less do threads wait for
each other in Python's interpreter. A file that is in any way unusual is left to PIL's reader.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

SMALL = 0xFFFF  # bytes of filtered rows
BLOCK = 0xFFFF  # bytes, the most that one block of a stream without compression holds
FILTERS = 5
LARGEST_PALETTE = 3 * 256  # bytes

# Bits and colour type → channels, and the name of the layout in PIL's decoder; the mode precedes a semicolon.
_LAYOUTS = {
    (1, 0): (1, "1"),
    (2, 0): (1, "L;2"),
    (4, 0): (1, "L;4"),
    (8, 0): (1, "L"),
    (8, 2): (3, "RGB"),
    (1, 3): (1, "P;1"),
    (2, 3): (1, "P;2"),
    (4, 3): (1, "P;4"),
    (8, 3): (1, "P"),
}


class Filtered(NamedTuple):
    """A picture whose rows are inflated and not yet unfiltered; that cannot fail.

    Attributes:
        width, height: in pixels.
        layout: of the rows, as PIL calls it.
        rows: a filter and the bytes of each row.
        palette: RGB, or None.
    """

    width: int
    height: int
    layout: str
    rows: bytes
    palette: bytes | None


def inflated(content: bytes) -> Filtered | None:
    """Inflate a small PNG file, which begins with a PNG header; return None where PIL's reader must decide."""
    try:
        width, height, bits, colour, interlaced = struct.unpack_from(">IIBB2xB", content, 16)
        channels, layout = _LAYOUTS[bits, colour]
        stride = 1 + (width * channels * bits + 7) // 8
        if interlaced or not 0 < height * stride <= SMALL:
            return None
        compressed, palette = _chunks(content)
        inflating = zlib.decompressobj()
        rows = inflating.decompress(compressed, height * stride + 1)
    except (LookupError, ValueError, struct.error, zlib.error):
        return None
    whole = inflating.eof and len(rows) == height * stride
    if len(palette or b"") > LARGEST_PALETTE:  # which PIL refuses, and unfiltering must not fail
        return None
    if not whole or max(rows[::stride]) >= FILTERS or (palette is None) == (colour == 3):
        return None
    return Filtered(width, height, layout, rows, palette)


def unfiltered(pictures: Sequence[Filtered]) -> list[np.ndarray]:
    """Return the levels of pictures, [height, width, 3] uint8 each; those of one kind are unfiltered together."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for n, picture in enumerate(pictures):
        kinds.setdefault((picture.width, picture.layout, picture.palette), []).append(n)
    levels: list[np.ndarray] = [np.empty(0)] * len(pictures)
    for alike in kinds.values():
        together, top = _unfiltered([pictures[n] for n in alike]), 0
        for n in alike:
            levels[n] = together[top : top + pictures[n].height]
            top += pictures[n].height + 1
    return levels


def _unfiltered(pictures: Sequence[Filtered]) -> np.ndarray:
    """Return the levels of pictures of one kind below each other, with a row between every two.

    That row is zero, as the one that PNG's filters assume above a picture (PNG specification, section 9.2).
    """
    first = pictures[0]
    rows = bytes(len(first.rows) // first.height).join(picture.rows for picture in pictures)
    height = sum(picture.height + 1 for picture in pictures) - 1
    mode = first.layout.partition(";")[0]
    image = Image.frombytes(mode, (first.width, height), _stream(rows), "zip", first.layout, 0)
    if first.palette is not None:
        image.putpalette(first.palette)
    return np.asarray(image if mode == "RGB" else image.convert("RGB"))


def _stream(content: bytes) -> bytes:
    """Return bytes as zlib's stream without compression (RFC 1950, RFC 1951 section 3.2.4)."""
    parts = [b"\x78\1"]
    for start in range(0, len(content), BLOCK):
        block = content[start : start + BLOCK]
        last = start + BLOCK >= len(content)
        parts += (struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF), block)
    return b"".join((*parts, struct.pack(">I", zlib.adler32(content))))


def _chunks(content: bytes) -> tuple[bytes, bytes | None]:
    """Return the compressed rows and the palette (PNG specification, section 5.3).

    Raises:
        ValueError, struct.error: a chunk is damaged or cut off.
    """
    compressed, palette, place = [], None, 8
    while True:
        (length,) = struct.unpack_from(">I", content, place)
        body = content[place + 4 : place + 8 + length]
        if struct.unpack_from(">I", content, place + 8 + length)[0] != zlib.crc32(body):
            raise ValueError("its checksum is wrong")
        kind = body[:4]
        if kind == b"IDAT":
            compressed.append(body[4:])
        elif kind == b"PLTE":
            palette = body[4:]
        elif kind == b"IEND":
            return b"".join(compressed), palette
        place += 12 + length
