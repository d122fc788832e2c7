"""Reader of folders with a sub-folder of pictures per class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tracer.data.sample import Sample
from tracer.data.text import default_caption

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def read_folder(source: Path) -> Iterator[Sample]:
    """Yield the pictures in the sub-folders of ``source``, at any depth, sorted by path.

    The sub-folder directly below ``source`` names the class, and the caption is made from that name. Files
    directly in ``source`` and files with other suffixes than ``SUFFIXES`` are left out.
    """
    for image in sorted(path for path in source.glob("*/**/*") if path.suffix.lower() in SUFFIXES):
        label = image.relative_to(source).parts[0]
        yield Sample(image, label, [default_caption(label)])
