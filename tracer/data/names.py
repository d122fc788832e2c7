"""Names of files that are not data, and the one note about files that a reader left out."""

from __future__ import annotations

import sys
from collections import Counter
from functools import cache
from pathlib import PurePath

SUFFIXES = (
    {".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".mpo"}  # JPEG under all of its suffixes
    | {".png", ".apng", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"}
)

SYSTEM_NAMES = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin"}  # lower case


def is_picture(path: PurePath) -> bool:
    """Return whether the suffix says that the file is a picture that can be decoded."""
    return path.suffix.lower() in SUFFIXES


def is_hidden(path: PurePath) -> bool:
    """Return whether a path, relative to its data set, leads to something that a program keeps for itself.

    These are names that begin with a dot (``.ipynb_checkpoints``, ``.DS_Store``, ``._0.png``) and a few others
    (``__MACOSX``, ``Thumbs.db``).
    """
    return any((part.startswith(".") and part != "..") or part.lower() in SYSTEM_NAMES for part in path.parts)


def tally(reasons: Counter[str]) -> str:
    """Return "3 .gif, 1 .txt": each reason with its count, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


@cache
def note(message: str) -> None:
    """Print a line on stderr, once in the life of the process, however often a data set is read."""
    print(f"tracer: note: {message}", file=sys.stderr)
