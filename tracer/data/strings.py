"""Texts in one array, and their numbering as they come: each distinct text once, in little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

SLOTS = 1 << 10  # of a table of numbers at first; a power of 2


@dataclass
class Strings:
    """Texts in one array of UTF-8: text n is ``blob[ends[n - 1]:ends[n]]``, in bytes."""

    blob: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, n: int) -> str:
        start = int(self.ends[n - 1]) if n else 0
        return self.blob[start : int(self.ends[n])].tobytes().decode("utf-8", "surrogateescape")

    def some(self, numbers: np.ndarray) -> Iterator[tuple[int, str]]:
        """Yield many texts with their numbers, faster than one by one."""
        blob, ends = self.blob.tobytes(), [0, *self.ends.tolist()]
        for n in numbers.tolist():
            yield n, blob[ends[n] : ends[n + 1]].decode("utf-8", "surrogateescape")


class StringsBuilder:
    """Numbers texts as they come, into a file or into memory; a text that comes again gets its old number.

    A dictionary of the texts would take 200 bytes each. Here a text is recognised by its hash of 64 bits, in a
    table with open addressing that is never more than half full: 16 to 24 bytes each. Of ten million texts two
    share a hash with a probability of 3 in a million.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._ends, self._place = file, array("q"), 0
        self._hashes = array("q")  # by number, with 0 for texts that nobody looks for
        self._table = array("i", [-1]) * SLOTS  # numbers, at the slots of their hashes or behind them
        self._mask, self._filled = SLOTS - 1, 0

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, text: str) -> int:
        """Add a text that nobody will look for again."""
        self._hashes.append(0)
        return self._append(text)

    def number(self, text: str) -> int:
        """Return the text's number."""
        key, table, hashes = hash(text), self._table, self._hashes
        slot = key & self._mask
        while (number := table[slot]) >= 0:
            if hashes[number] == key:
                return number
            slot = (slot + 1) & self._mask
        number = table[slot] = self._append(text)
        hashes.append(key)
        self._filled += 1
        if 2 * self._filled > self._mask:
            self._grow()
        return number

    def _append(self, text: str) -> int:
        content = text.encode("utf-8", "surrogateescape")
        self._file.write(content)
        self._place += len(content)
        self._ends.append(self._place)
        return len(self._ends) - 1

    def _grow(self) -> None:
        """Make the table twice as large: each text moves once for every time that their number has doubled."""
        numbers = np.frombuffer(self._table, np.int32)
        numbers = np.sort(numbers[numbers >= 0]).tolist()
        self._mask = 2 * self._mask + 1
        self._table = table = array("i", [-1]) * (self._mask + 1)
        for number in numbers:
            slot = self._hashes[number] & self._mask
            while table[slot] >= 0:
                slot = (slot + 1) & self._mask
            table[slot] = number

    def strings(self) -> Strings:
        """Return the texts so far."""
        self._file.seek(0)
        blob = np.fromfile(self._file, np.uint8) if _on_disk(self._file) else _in_memory(self._file)
        return Strings(blob, np.frombuffer(self._ends, np.int64) if self._ends else np.zeros(0, np.int64))


def _on_disk(file: BinaryIO) -> bool:
    try:
        return file.fileno() >= 0
    except OSError:
        return False


def _in_memory(file: BinaryIO) -> np.ndarray:
    return np.frombuffer(file.read(), np.uint8)
