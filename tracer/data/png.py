"""Small PNG files decoded faster: inflated in one piece, then unfiltered by PIL's own decoder of rows.

PIL and libpng inflate a picture row by row, and zlib takes twice as long for pieces that are shorter than a few
hundred bytes. PIL's reader of the file adds a fifth to that. Here zlib inflates the whole, and PIL gets the rows
as a stream without compression, which costs a copy. A file that is in any way unusual is left to PIL's reader.
"""

from __future__ import annotations

import struct
import zlib

from PIL import Image

SMALL = 0xFFFF  # bytes of filtered rows: the most that one block of a stream without compression holds

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


def quickly(content: bytes) -> Image.Image | None:
    """Decode a small PNG file, in the mode of its file; return None where PIL's reader must decide.

    Args:
        content: the file, which begins with a PNG header.
    """
    try:
        width, height, bits, colour, interlaced = struct.unpack_from(">IIBB2xB", content, 16)
        channels, layout = _LAYOUTS[bits, colour]
        length = height * (1 + (width * channels * bits + 7) // 8)
        if interlaced or length > SMALL:
            return None
        compressed, palette = _chunks(content)
        inflating = zlib.decompressobj()
        rows = inflating.decompress(compressed, length + 1)
        if not inflating.eof or len(rows) != length or (palette is None) == (colour == 3):
            return None
        stream = b"".join(
            (
                b"\x78\1\1",
                struct.pack("<HH", length, length ^ SMALL),
                rows,
                struct.pack(">I", zlib.adler32(rows)),
            )
        )
        image = Image.frombytes(layout.partition(";")[0], (width, height), stream, "zip", layout, 0)
    except (LookupError, ValueError, struct.error, zlib.error):  # ValueError: PIL refuses the rows
        return None
    if palette is not None:
        image.putpalette(palette)
    return image


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
