"""The index of a data set: its pictures, labels and captions, whichever format they were read from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tracer.data.folder import read_folder
from tracer.data.sample import Sample
from tracer.data.table import read_table
from tracer.errors import UserError


@dataclass
class Index:
    """A data set of N pictures, column by column.

    Attributes:
        name: what messages and results call it.
        images: N paths.
        labels: N class names; None where a picture has no label.
        captions: N lists of at least one caption.
    """

    name: str
    images: list[Path]
    labels: list[str | None]
    captions: list[list[str]]

    @cached_property
    def classes(self) -> list[str]:
        """The distinct labels, sorted; pictures without a label belong to no class."""
        return sorted({label for label in self.labels if label is not None})

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """Return a hash of all labels, captions and picture files; a file counts by path, size and mtime."""
        stats = [path.stat() for path in self.images]
        stamps = [
            (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
            for path, stat in zip(self.images, stats, strict=True)
        ]
        return hashlib.sha256(json.dumps([self.labels, self.captions, stamps]).encode()).hexdigest()

    def take(self, rows: list[int]) -> Index:
        """Return the index of the pictures in ``rows``, in that order."""
        return Index(
            self.name,
            [self.images[r] for r in rows],
            [self.labels[r] for r in rows],
            [self.captions[r] for r in rows],
        )


def read_index(source: Path, name: str | None = None) -> Index:
    """Read a CSV file (:func:`read_table`) or a folder with a sub-folder per class (:func:`read_folder`).

    Args:
        source: the file or the folder.
        name: name of the index; default: that of the source without its suffix.

    Raises:
        UserError: the source does not exist, cannot be read, holds no pictures, or names some that do not exist.
    """
    samples = list(_samples(source))
    if not samples:
        raise UserError(
            f"data '{source}' holds no pictures: a CSV needs at least one row below its header, "
            "a folder needs <class>/<picture>"
        )
    index = Index(name or source.resolve().stem, *(list(column) for column in zip(*samples, strict=True)))
    missing = [path for path in index.images if not path.is_file()]
    if missing:
        raise UserError(
            f"'{source}' names {len(missing)} pictures that do not exist, first '{missing[0]}': "
            "paths are relative to the CSV"
        )
    return index


def _samples(source: Path) -> Iterator[Sample]:
    """Choose the reader by what the source is; a new format is a new file and a line here."""
    if source.is_dir():
        return read_folder(source)
    if source.is_file():
        return read_table(source)
    raise UserError(f"data '{source}' does not exist: give a CSV file or a folder of class folders")
