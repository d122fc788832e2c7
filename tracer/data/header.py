"""The first bytes of JPEG, PNG and WebP files: size, orientation and depth, without decoding and without PIL."""

from __future__ import annotations

import struct
from typing import NamedTuple

PNG = b"\x89PNG\r\n\x1a\n"
ORIENTATION = 0x0112  # EXIF: how the camera was turned; from 5 on, height and width change places
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # JPEG's SOF markers


_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "WEBP": b""}
TAIL = 64  # bytes in which the end marker lies; some programs write zeros behind it


class Header(NamedTuple):
    """What the header of a picture file says.

    Attributes:
        format: "JPEG", "PNG" or "WEBP".
        height, width: in pixels, as stored.
        orientation: EXIF's, from 1 (upright) to 8.
        bits: of each channel.
        plain: whether PIL, torchvision and DALI all decode the file to the same RGB levels.
        length: of the file in bytes, at least; 0 where the header does not say it.
    """

    format: str
    height: int
    width: int
    orientation: int
    bits: int
    plain: bool
    length: int = 0


def read_header(content: bytes | memoryview) -> Header | None:
    """Return the header of a JPEG, PNG or WebP file; None for other formats and where it is cut off or unusual.

    Args:
        content: the file, or its beginning.
    """
    try:
        if content[:2] == b"\xff\xd8":
            return _jpeg(content)
        if content[:8] == PNG and content[12:16] == b"IHDR":
            return _png(content)
        if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            return _webp(content)
    except (IndexError, struct.error):
        pass  # cut off
    return None


def ends_well(kind: str, tail: bytes) -> bool:
    """Return whether a file has the end marker of its format, if that has one.

    Args:
        kind: the format.
        tail: the file's last :data:`TAIL` bytes, or more.
    """
    return tail[-TAIL:].rstrip(b"\0").endswith(_ENDS[kind])


def _jpeg(content: bytes | memoryview) -> Header | None:
    """Walk over the segments to the frame (ITU-T T.81, annex B)."""
    place, orientation = 2, 1
    while True:
        if content[place] != 0xFF:
            return None
        while content[place] == 0xFF:  # fill bytes may precede a marker
            place += 1
        marker, length = content[place], struct.unpack_from(">H", content, place + 1)[0]
        if marker in _FRAMES:
            bits, height, width = struct.unpack_from(">BHH", content, place + 3)
            whole = bits == 8 and height > 0 and width > 0
            return Header("JPEG", height, width, orientation, bits, True) if whole else None
        if marker == 0xE1 and content[place + 3 : place + 9] == b"Exif\0\0":
            orientation = _orientation(bytes(content[place + 9 : place + 1 + length]))
        if marker == 0xDA or length < 2:
            return None
        place += 1 + length


def _orientation(exif: bytes) -> int:
    """Return the orientation in the first directory of a TIFF structure, 1 where there is none."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        if order is None:
            return 1
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == ORIENTATION and kind == 3:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _png(content: bytes | memoryview) -> Header | None:
    """Read IHDR, and walk over the chunks before the pixels (PNG specification, section 11)."""
    width, height, bits, colour = struct.unpack_from(">IIBB", content, 16)
    plain, orientation, place = bits <= 8 and colour in (0, 2, 3), 1, 33
    while True:
        (length,) = struct.unpack_from(">I", content, place)
        kind = bytes(content[place + 4 : place + 8])
        if kind == b"IDAT":
            whole = height > 0 and width > 0
            return Header("PNG", height, width, orientation, bits, plain) if whole else None
        if len(kind) < 4:
            return None
        if kind in (b"tRNS", b"acTL", b"eXIf"):
            plain = False
            if kind == b"eXIf":
                orientation = _orientation(bytes(content[place + 8 : place + 8 + length]))
        place += 12 + length


def _webp(content: bytes | memoryview) -> Header | None:
    """Read the first chunk of a WebP file (RFC 9649, sections 2.5 to 2.7)."""
    (length,) = struct.unpack_from("<I", content, 4)
    kind = bytes(content[12:16])
    if kind == b"VP8X":
        if content[20] & 0x08:  # EXIF, which lies behind the pixels
            return None
        width, height = (int.from_bytes(content[place : place + 3], "little") + 1 for place in (24, 27))
    elif kind == b"VP8L" and content[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", content, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 " and bytes(content[23:26]) == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 26))
    else:
        return None
    return Header("WEBP", height, width, 1, 8, False, length + 8) if width and height else None
