"""The columns of an index: built row by row in bounded memory, kept as plain arrays and mapped to be read."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

import numpy as np

from tracer.data.check import Sight
from tracer.data.sample import Fault, Sample
from tracer.data.strings import Strings, StringsBuilder

T = TypeVar("T")
MOST_FAULTS = 100_000  # that are kept by name


class Rows(Sequence[T]):
    """A column as a read-only sequence whose items are made when they are asked for."""

    def __init__(self, get: Callable[[int], T], count: int) -> None:
        self._get, self._count = get, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, row: int) -> T: ...
    @overload
    def __getitem__(self, row: slice) -> list[T]: ...
    def __getitem__(self, row: int | slice) -> T | list[T]:
        if isinstance(row, slice):
            return [self._get(i) for i in range(*row.indices(self._count))]
        number = row.__index__()
        if not -self._count <= number < self._count:
            raise IndexError(f"row {number} of {self._count}")
        return self._get(number % self._count)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))


@dataclass
class Columns:
    """The columns of N samples in F files with T texts and C captions; every one but the strings is an array.

    Attributes:
        file: number of the sample's file [N] int32.
        offset, size: of its bytes in the file [N] int64; size −1 means the whole file.
        label: number of its class [N] int32, −1 where it has none.
        key: number of its name in the shard [N] int32, −1 for a file of its own.
        first, count: its captions are ``captions[first:first + count]`` [N] int64, int32.
        captions: numbers of texts [C] int32.
        stamps: size in bytes and time of change in ns of each file, when it was indexed [F, 2] int64.
        files, keys, texts: paths, names in shards, and distinct captions.
    """

    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    key: np.ndarray
    first: np.ndarray
    count: np.ndarray
    captions: np.ndarray
    stamps: np.ndarray
    files: Strings
    keys: Strings
    texts: Strings

    OF_SAMPLES = ("file", "offset", "size", "label", "key", "first", "count")

    def take(self, rows: np.ndarray | list[int]) -> Columns:
        """Return the columns of some samples, in the order of ``rows``; texts and files stay shared."""
        rows = np.asarray(rows, np.int64)
        chosen = {name: getattr(self, name)[rows] for name in self.OF_SAMPLES}
        return Columns(**{f.name: chosen.get(f.name, getattr(self, f.name)) for f in fields(self)})

    def save(self, folder: Path) -> None:
        """Write each column as a file of NumPy's."""
        for name, value in self._arrays():
            np.save(folder / f"{name}.npy", value)

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self)):
            if isinstance(value, Strings):
                yield from ((f"{name}.blob", value.blob), (f"{name}.ends", value.ends))
            else:
                yield name, value

    @classmethod
    def load(cls, folder: Path) -> Columns:
        """Map the columns in ``folder`` into memory."""

        def column(name: str) -> np.ndarray:
            return np.load(folder / f"{name}.npy", mmap_mode="r")

        columns: dict[str, Any] = {}
        for name in (f.name for f in fields(cls)):
            strings = name in ("files", "keys", "texts")
            columns[name] = (
                Strings(*(column(f"{name}.{part}").view(np.ndarray) for part in ("blob", "ends")))
                if strings
                else column(name)
            )
        return cls(**columns)


@dataclass
class About:
    """What an index knows besides its columns.

    Attributes:
        classes: ids of the classes, in the order of their numbers.
        names: display name of each class; several classes may share one.
        named: whether the data set itself gives these names; else they are made of the ids.
        templates: prompts of the data set with ``{}`` for the name; empty where it has none.
        formats: pictures by format.
        turned: pictures that EXIF would turn.
        sixteen: pictures of 16 bits a channel.
        bytes: of all pictures together.
        faults: the first of what was left out, as ids and reasons.
        reasons: how many samples were left out for each reason.
        total: samples that the data set names, those left out included.
    """

    classes: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    named: bool = False
    templates: list[str] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    turned: int = 0
    sixteen: int = 0
    bytes: int = 0
    faults: list[Fault] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    total: int = 0

    def fault(self, fault: Fault) -> None:
        """Count a sample that is left out, and keep the first ones by name."""
        self.reasons[fault.reason] = self.reasons.get(fault.reason, 0) + 1
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(fault)

    def saw(self, sight: Sight) -> None:
        """Count a good picture."""
        self.formats[sight.format] = self.formats.get(sight.format, 0) + 1
        self.turned += sight.turned
        self.sixteen += sight.sixteen

    def save(self, path: Path, **more: Any) -> None:
        """Write everything, and ``more``, as JSON."""
        path.write_text(json.dumps(asdict(self) | more))

    @classmethod
    def load(cls, path: Path) -> tuple[About, dict[str, Any]]:
        """Read what :meth:`save` wrote, and what it wrote besides."""
        content = json.loads(path.read_text())
        known = {f.name: content.pop(f.name) for f in fields(cls)}
        known["faults"] = [Fault(*fault) for fault in known["faults"]]
        return cls(**known), content


class Builder:
    """Takes samples in any order and merges those of one picture file into one sample with all its captions.

    Args:
        scratch: opens a file for the texts of a column, by its name.
    """

    def __init__(self, scratch: Callable[[str], BinaryIO]) -> None:
        self.files, self.keys, self.texts = (StringsBuilder(scratch(n)) for n in ("files", "keys", "texts"))
        self._rows = {"file": array("i"), "offset": array("q"), "size": array("q")}
        self._rows |= {"label": array("i"), "key": array("i")}
        self._sample_of = array("i")  # the sample of each file of its own; −1 for a shard
        self._pairs = array("i"), array("i")  # samples and texts of all captions
        self._labels: dict[str, int] = {}

    def add(self, sample: Sample) -> int | None:
        """Add a sample, and return its number; None where it gives an earlier file another label."""
        file = self.files.number(sample.file)
        label = -1 if sample.label is None else self._labels.setdefault(sample.label, len(self._labels))
        rows, new = self._rows, len(self)
        if file == len(self._sample_of):
            self._sample_of.append(-1 if sample.key else new)
        number = new if sample.key else self._sample_of[file]
        if number == new:
            key = self.keys.append(sample.key) if sample.key else -1
            for name, value in zip(rows, (file, sample.offset, sample.size, label, key), strict=True):
                rows[name].append(value)
        elif label >= 0:
            if rows["label"][number] not in (-1, label):
                return None
            rows["label"][number] = label
        for caption in sample.captions:
            self._pairs[0].append(number)
            self._pairs[1].append(self.texts.number(caption))
        return number

    def __len__(self) -> int:
        return len(self._rows["file"])

    def columns(self) -> tuple[Columns, list[str]]:
        """Return the columns, and the class ids in the order of the label numbers."""
        count = len(self)
        arrays = {
            n: np.frombuffer(a, a.typecode) if count else np.zeros(0, "i4") for n, a in self._rows.items()
        }
        samples, texts = (np.frombuffer(a, np.int32) if a else np.zeros(0, np.int32) for a in self._pairs)
        samples, texts = _distinct_pairs(samples, texts)
        counts = np.bincount(samples, minlength=count).astype(np.int32)
        first = np.zeros(count, np.int64)
        np.cumsum(counts[:-1], out=first[1:])
        columns = Columns(
            **arrays,
            first=first,
            count=counts,
            captions=texts,
            stamps=np.full((len(self.files), 2), -1, np.int64),
            files=self.files.strings(),
            keys=self.keys.strings(),
            texts=self.texts.strings(),
        )
        return columns, list(self._labels)


def _distinct_pairs(samples: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the captions grouped by sample, in the order in which they came, each text once a sample."""
    order = np.argsort(samples, kind="stable")
    samples, texts = samples[order], texts[order]
    pair = (samples.astype(np.int64) << 32) | texts
    _, kept = np.unique(pair, return_index=True)
    kept.sort()
    return samples[kept], texts[kept]
