"""The index of a data set: pictures, labels and captions as columns, whichever format they were read from."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from tracer.data.columns import About, Columns, Rows
from tracer.data.remote import ShardCache, address_of
from tracer.data.text import TEMPLATE


@dataclass
class Index:
    """A data set of N pictures.

    Attributes:
        name: what messages and results call it.
        columns: files, offsets, labels and captions, as arrays that may be mapped from a file.
        about: classes, formats, faults.
        shards: local copies of shards at an address; None where there are none.
        templates: captions of a sample without its own: ``{}`` stands for the name of its class.
        border: pixels that are cut off each side of every picture.
        began: digest of what it held when a run began with it, of which pictures may have been lost since; empty
            for an index that was read now.
    """

    name: str
    columns: Columns
    about: About
    shards: ShardCache | None = None
    templates: list[str] = field(default_factory=lambda: [TEMPLATE])
    border: int = 0
    began: str = ""

    def __len__(self) -> int:
        return len(self.columns.file)

    @property
    def classes(self) -> list[str]:
        """The ids of the classes, by their numbers."""
        return self.about.classes

    @property
    def names(self) -> dict[str, str]:
        """The display name of each class, by its id; several classes may have the same."""
        return dict(zip(self.about.classes, self.about.names, strict=True))

    @property
    def images(self) -> Rows[Path]:
        """The path of each picture, or of the shard that holds it."""
        return Rows(lambda row: Path(self.columns.files[int(self.columns.file[row])]), len(self))

    @property
    def labels(self) -> Rows[str | None]:
        """The class id of each picture; None where it has no label."""

        def label(row: int) -> str | None:
            number = int(self.columns.label[row])
            return None if number < 0 else self.about.classes[number]

        return Rows(label, len(self))

    @property
    def captions(self) -> Rows[list[str]]:
        """The captions of each picture, made of the templates where it has none of its own."""
        return Rows(lambda row: [self.caption(row, n) for n in range(self.caption_count(row))], len(self))

    def caption_count(self, row: int) -> int:
        """Return the number of a picture's captions, at least 1."""
        return int(self.columns.count[row]) or len(self.templates)

    def caption(self, row: int, number: int) -> str:
        """Return one of a picture's captions."""
        if self.columns.count[row]:
            return self.columns.texts[int(self.columns.captions[int(self.columns.first[row]) + number])]
        return self.templates[number].replace("{}", self.about.names[int(self.columns.label[row])])

    def drawn(self, rows: np.ndarray, choice: np.ndarray) -> list[str]:
        """Return one caption of each of some pictures [n], chosen by ``choice`` [n] from 0 to below 1.

        It does for a batch what :meth:`caption` does, with fewer steps of the interpreter.
        """
        columns = self.columns
        own = columns.count[rows]
        number = (choice * np.where(own > 0, own, len(self.templates))).astype(np.int64)
        text = np.full(len(rows), -1, np.int64)
        text[own > 0] = columns.captions[(columns.first[rows] + number)[own > 0]]
        known = {n: columns.texts[n] for n in set(text.tolist()) if n >= 0}
        drawn = zip(text.tolist(), number.tolist(), rows.tolist(), strict=True)
        return [known[n] if n >= 0 else self.caption(row, template) for n, template, row in drawn]

    @cached_property
    def label_numbers(self) -> np.ndarray:
        """The class number of each picture [N] int64; one without a label has a number of its own."""
        label = np.asarray(self.columns.label, np.int64)
        return np.where(label < 0, len(self.classes) + np.arange(len(label)), label)

    def id(self, row: int) -> str:
        """Return what messages call a picture: its path, or its shard and its name in it."""
        file, key = self.columns.files[int(self.columns.file[row])], int(self.columns.key[row])
        return file if key < 0 else f"{file}: {self.columns.keys[key]}"

    def read(self, row: int) -> bytes:
        """Return the bytes of a picture.

        Raises:
            OSError: the file cannot be read.
            UserError: its shard cannot be fetched.
        """
        columns, number = self.columns, int(self.columns.file[row])
        file, size, offset = columns.files[number], int(columns.size[row]), int(columns.offset[row])
        if self.shards is not None and address_of(file):
            handle = self.shards.open(file)
        else:
            handle = os.open(file, os.O_RDONLY)
        try:
            if size >= 0:
                return os.pread(handle, size, offset)
            size = int(columns.stamps[number, 0])  # a call of the system less, where it still holds
            if size > 0 and len(content := os.pread(handle, size + 1, 0)) == size:
                return content
            return os.pread(handle, os.fstat(handle).st_size, 0)
        finally:
            os.close(handle)

    def take(self, rows: np.ndarray | list[int]) -> Index:
        """Return the index of the pictures in ``rows``, in that order, with the same classes."""
        return replace(self, columns=self.columns.take(rows), began="")

    def digest(self) -> str:
        """Return a hash of all labels, captions and picture files; a file counts by path, size and mtime."""
        columns, digest, folder = self.columns, hashlib.sha256(), os.getcwd()
        used = np.unique(columns.file)
        for number, file in columns.files.some(used):
            if address_of(file) is None:
                try:
                    about = os.stat(file)
                    size, changed = about.st_size, about.st_mtime_ns
                except OSError:  # it has vanished since; another picture stands in, and the run may go on
                    size, changed = columns.stamps[number].tolist()
                file = f"{os.path.join(folder, file)} {size} {changed}"
            digest.update(file.encode("utf-8", "surrogateescape") + b"\n")
        digest.update(np.searchsorted(used, columns.file).tobytes())
        texts = (columns.captions, columns.texts.blob, columns.texts.ends)
        samples = (columns.offset, columns.size, columns.label, columns.first, columns.count)
        for column in (*samples, *texts):
            digest.update(np.ascontiguousarray(column).data)
        digest.update(
            json.dumps([self.about.classes, self.about.names, self.templates, self.border]).encode()
        )
        return digest.hexdigest()
