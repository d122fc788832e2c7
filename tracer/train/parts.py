"""The parts of a checkpoint: one file a rank, which any number of ranks reads.

A part is a safetensors file, which holds no code. It holds pieces: elements of a tensor from one element on, flat,
and its header says from which. So a rank reads the elements that it keeps from whichever files have them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from tracer.files import write_tensors


class Piece(NamedTuple):
    """Elements of a tensor from element ``begin`` on, flat: a view of where the run keeps them."""

    values: Tensor
    begin: int = 0

    def share(self, rank: int, size: int) -> Piece:
        """Return the share of one of ``size`` ranks that all keep the same elements."""
        n = self.values.numel()
        start, stop = n * rank // size, n * (rank + 1) // size
        return Piece(self.values[start:stop], self.begin + start)


def write_part(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Write the pieces of a rank, whole or not at all; empty ones are left out.

    Raises:
        OSError: the file cannot be written.
    """
    some = {name: piece for name, piece in pieces.items() if piece.values.numel()}
    begins = json.dumps({name: piece.begin for name, piece in some.items()})
    write_tensors(path, {name: piece.values for name, piece in some.items()}, {"begins": begins})


class Parts:
    """The parts of one checkpoint, open to be read.

    Args:
        files: one for each rank that wrote.
        stack: closes the files.
    """

    def __init__(self, files: Sequence[Path], stack: ExitStack) -> None:
        self._pieces: dict[str, list[tuple[Any, int, int]]] = {}  # name → file, first element, length
        self._files: list[Any] = []
        for path in files:
            file = stack.enter_context(safe_open(path, "pt"))
            for name, begin in json.loads(file.metadata()["begins"]).items():
                length = file.get_slice(name).get_shape()[0]
                self._pieces.setdefault(name, []).append((file, begin, length))
            self._files.append(file)

    def has(self, name: str) -> bool:
        """Return whether any rank has written a piece of this tensor."""
        return name in self._pieces

    def of_rank(self, rank: int, name: str) -> Tensor | None:
        """Return the piece that one of the writers wrote, None where it wrote none."""
        file = self._files[rank % len(self._files)]
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 (not a dictionary)

    def read_into(self, name: str, piece: Piece) -> None:
        """Write the saved elements of a tensor into ``piece``.

        Raises:
            ValueError: the files do not hold all of them.
        """
        first, last, held = piece.begin, piece.begin + piece.values.numel(), 0
        for file, begin, length in self._pieces.get(name, ()):
            start, stop = max(first, begin), min(last, begin + length)
            if start < stop:
                values = file.get_slice(name)[start - begin : stop - begin]
                piece.values[start - first : stop - first].copy_(values)
                held += stop - start
        if held != last - first:
            raise ValueError(f"{last - first - held} elements of '{name}' are missing")
