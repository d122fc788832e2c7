"""The quick way to decode small PNG files, against PIL's reader of files."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from benchmarks.pictures import drawing
from tracer.data.png import SMALL, inflated, unfiltered

WIDTH, HEIGHT = 37, 29  # rows that end within a byte


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    bits: int, colour: int, parts: int = 1, interlaced: int = 0, more: bytes = b"", seed: int = 0
) -> bytes:
    """A PNG of random levels, whose rows have all five filters in turn, beginning with that of ``seed``."""
    random = np.random.default_rng(10 * bits + colour)
    length = (WIDTH * bits * (3 if colour == 2 else 1) + 7) // 8
    rows = b"".join(bytes([(n + seed) % 5]) + random.bytes(length) for n in range(HEIGHT))
    whole, palette = zlib.compress(rows), chunk(b"PLTE", random.bytes(3 * 2**bits)) if colour == 3 else b""
    step = -(-len(whole) // parts)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colour, 0, 0, interlaced)),
            palette,
            more,
            *(chunk(b"IDAT", whole[place : place + step]) for place in range(0, len(whole), step)),
            chunk(b"IEND", b""),
        ]
    )


def by_pil(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


PLAIN = [
    (bits, colour) for bits, colour in itertools.product((1, 2, 4, 8), (0, 2, 3)) if colour != 2 or bits == 8
]


@pytest.mark.parametrize(("bits", "colour"), PLAIN)
def test_every_plain_layout_has_the_pixels_of_pil(bits, colour):
    text = chunk(b"tEXt", b"Software\0pencil")
    for content in (png(bits, colour), png(bits, colour, parts=3, more=text)):
        small = inflated(content)
        assert small is not None
        assert np.array_equal(unfiltered([small])[0], by_pil(content))


def test_pictures_of_every_kind_are_unfiltered_together():
    """Each as if it were alone: filters look at the row above, and above the first row there is none."""
    contents = [png(bits, colour, seed=seed) for seed in range(8) for bits, colour in PLAIN]
    for side in (64, 64, 147, 147, 147, 30):  # of which three together are longer than a block
        file = io.BytesIO()
        drawing(side + len(contents), side, side).save(file, "PNG")
        contents.append(file.getvalue())
    small = [each for content in contents if (each := inflated(content)) is not None]
    assert len(small) == len(contents)
    for content, levels in zip(contents, unfiltered(small), strict=True):
        assert np.array_equal(levels, by_pil(content))
    assert unfiltered([]) == []


def test_drawings_are_decoded_quickly_up_to_a_size():
    for side in (2, 64, 147, 148):
        file = io.BytesIO()
        drawing(side, side, side).save(file, "PNG")
        small = inflated(file.getvalue())
        assert (small is None) == (side * (1 + 3 * side) > SMALL) == (side == 148)
        assert small is None or np.array_equal(unfiltered([small])[0], by_pil(file.getvalue()))


def changed(place: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:place] + new + content[place + len(new) :]


def with_rows(change: Callable[[bytes], bytes]) -> bytes:
    """A PNG of 8-bit colours whose stream of rows was changed; the file's checksums are right."""
    content = png(8, 2)
    (length,) = struct.unpack_from(">I", content, 33)
    rows = zlib.decompress(content[41 : 41 + length])
    return content[:33] + chunk(b"IDAT", change(rows)) + chunk(b"IEND", b"")


UNUSUAL = {
    "a wrong checksum": changed(60, bytes(20))(png(8, 2)),
    "a wrong header": changed(26, b"\1")(png(8, 0)),
    "a chunk that is cut off": png(8, 2)[:200],
    "no end": png(8, 2)[:-12],
    "an end that is cut off": png(8, 2)[:-3],
    "only a beginning": png(8, 2)[:20],
    "rows that are missing": with_rows(lambda rows: zlib.compress(rows[: -1 - 3 * WIDTH])),
    "rows that nobody asked for": with_rows(lambda rows: zlib.compress(rows * 9)),
    "a stream that is cut off": with_rows(lambda rows: zlib.compress(rows)[:-9]),
    "a stream without its checksum": with_rows(lambda rows: zlib.compress(rows)[:-2]),
    "a byte too many": with_rows(lambda rows: zlib.compress(rows + b"\0")),
    "a stream that is damaged": with_rows(lambda rows: changed(50, bytes(20))(zlib.compress(rows))),
    "a filter that does not exist": with_rows(lambda rows: zlib.compress(b"\7" + rows[1:])),
    "no palette": png(8, 3).replace(png(8, 3)[33 : 45 + 3 * 256], b""),
    "a palette of 300 colours": png(8, 3).replace(png(8, 3)[33 : 45 + 3 * 256], chunk(b"PLTE", bytes(900))),
    "16 bits": png(16, 2),
    "interlaced": png(8, 2, interlaced=1),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_an_unusual_file_is_left_to_pil(what):
    assert inflated(UNUSUAL[what]) is None
