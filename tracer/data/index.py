"""An index of pictures with labels and captions, and the one call that reads any source."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tracer.data.table import _read_csv
from tracer.data.text import default_caption
from tracer.errors import UserError

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass
class Index:
    """N pictures: ``images`` [N] paths, ``labels`` [N] class names, ``captions`` [N] lists of strings."""

    name: str
    images: list[Path]
    labels: list[str]
    captions: list[list[str]]

    @cached_property
    def classes(self) -> list[str]:
        return sorted(set(self.labels))

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """Changes with any name, label, caption, or picture file (by size and time of change)."""
        stats = [path.stat() for path in self.images]
        stamps = [
            (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
            for path, stat in zip(self.images, stats, strict=True)
        ]
        return hashlib.sha256(json.dumps([self.labels, self.captions, stamps]).encode()).hexdigest()

    def take(self, rows: list[int]) -> Index:
        """The index of some of the pictures."""
        return Index(
            self.name,
            [self.images[r] for r in rows],
            [self.labels[r] for r in rows],
            [self.captions[r] for r in rows],
        )


def read_index(source: Path, name: str | None = None) -> Index:
    """Read a CSV (columns image, label and/or captions) or a folder with a sub-folder of pictures per class.

    Paths in a CSV are relative to it. Without captions a caption is made of the label; without labels each
    picture is its own class.

    Raises:
        UserError: missing source, no CSV, wrong columns, missing files, empty data set.
    """
    name = name or source.stem
    if source.is_dir():
        images = sorted(p for p in source.glob("*/**/*") if p.suffix.lower() in PICTURES)
        labels = [p.relative_to(source).parts[0] for p in images]
        captions = [[default_caption(label)] for label in labels]
    elif source.is_file():
        try:
            images, labels, captions = _read_csv(source)
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"'{source}' is no CSV in UTF-8: {error}: save it as one, or give a folder of class folders"
            ) from error
    else:
        raise UserError(f"data '{source}' does not exist: give a CSV file or a folder of class folders")
    if not images:
        raise UserError(
            f"data '{source}' holds no pictures: a CSV needs at least one row below its header, "
            "a folder needs <class>/<picture>"
        )
    missing = [p for p in images if not p.is_file()]
    if missing:
        raise UserError(
            f"'{source}' names {len(missing)} pictures that do not exist, first '{missing[0]}': "
            "paths are relative to the CSV"
        )
    return Index(name, images, labels, captions)
