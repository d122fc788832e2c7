"""The positives of a tile of logits: a list of positions where they are few, a mask where they are many.

A list costs some ten nanoseconds for each positive, a mask less than one for each entry of the tile. Both
answer the same calls. What they return for *values at the positives* is their own affair: a vector with an
entry for each positive, or a tile that counts at the positives alone. Such values may be multiplied and added
with one another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contrastive import Inputs

# The directions of a sum: 1 over a row, 0 over a column.
ROW, COL = 1, 0
# Share of a tile from which on its positives are a mask.
DENSE = 1 / 12


class Listed(NamedTuple):
    """Positives by their places in the flattened tile, and their row and column in the whole matrix."""

    place: Tensor
    row: Tensor
    col: Tensor

    def take(self, tile: Tensor) -> Tensor:
        """Return the values of a tile at its positives."""
        return tile.view(-1)[self.place]

    def put_(self, tile: Tensor, values: Tensor | float) -> None:
        """Write values at the positives of a tile."""
        tile.view(-1)[self.place] = values  # type: ignore[call-overload]

    def subtract_(self, tile: Tensor, values: Tensor) -> None:
        """Subtract values at the positives from a tile."""
        tile.view(-1).index_add_(0, self.place, values, alpha=-1)

    def spread(self, vector: Tensor, direction: int) -> Tensor:
        """Return what a vector over all rows (columns) has at the positives."""
        return vector[self._along(direction)]

    def add_to(self, total: Tensor, values: Tensor, direction: int) -> None:
        """Add values at the positives to a vector over all rows (columns)."""
        total.index_add_(0, self._along(direction), values)

    def sum(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the sum of values at the positives."""
        return values.sum(dtype=dtype)

    def _along(self, direction: int) -> Tensor:
        return self.row if direction == ROW else self.col


class Masked(NamedTuple):
    """Positives as a mask over the tile, 1 and 0 in the tile's dtype, beside the rows and columns of the tile."""

    mask: Tensor
    positive: Tensor  # the same as booleans
    at: tuple[slice, slice]  # columns, rows

    def take(self, tile: Tensor) -> Tensor:
        """Return the values of a tile at its positives, 0 elsewhere."""
        return tile * self.mask

    def put_(self, tile: Tensor, values: Tensor | float) -> None:
        """Write values at the positives of a tile."""
        if isinstance(values, Tensor):
            torch.where(self.positive, values, tile, out=tile)
        else:
            tile.masked_fill_(self.positive, values)

    def subtract_(self, tile: Tensor, values: Tensor) -> None:
        """Subtract values at the positives from a tile."""
        tile.addcmul_(self.mask, values, value=-1)

    def spread(self, vector: Tensor, direction: int) -> Tensor:
        """Return the tile's part of a vector over all rows (columns), to be broadcast."""
        return vector[self.at[direction]].unsqueeze(direction)

    def add_to(self, total: Tensor, values: Tensor, direction: int) -> None:
        """Add values at the positives, 0 elsewhere, to a vector over all rows (columns)."""
        total[self.at[direction]] += values.sum(direction)

    def sum(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the sum of values at the positives, whatever they are elsewhere."""
        return (values * self.mask).sum(dtype=dtype)


TilePositives = Listed | Masked


class Positives:
    """The pairs of equal labels of a rectangle: counts per row and per column, and what each tile has of them.

    Args:
        inputs: of a call.
        dtype: of the counts and of masks.
        counted: whether the counts are needed.
    """

    def __init__(self, inputs: Inputs, dtype: torch.dtype, counted: bool = True) -> None:
        self._labels, self._text_labels = inputs.labels, inputs.text_labels
        self._device, self._dtype = inputs.image.device, dtype
        if not counted:
            return
        # How many each column and each row has, in the order of the directions 0 and 1.
        self.counts = tuple(
            torch.ones(len(x), dtype=dtype, device=self._device) for x in (inputs.text, inputs.image)
        )
        if self._labels is not None and self._text_labels is not None:
            of_columns, of_rows = (
                _occurrences(self._text_labels, self._labels.sort().values),
                _occurrences(self._labels, self._text_labels.sort().values),
            )
            self.counts = (of_columns[0].to(dtype), of_rows[0].to(dtype))

    def tile(self, at_rows: slice, at_cols: slice) -> TilePositives | None:
        """Return the positives of one tile; None if there are none."""
        if self._labels is None or self._text_labels is None:
            low, high = max(at_rows.start, at_cols.start), min(at_rows.stop, at_cols.stop)
            if low >= high:
                return None
            row = col = torch.arange(low, high, device=self._device)
            return _listed(row, col, at_rows, at_cols)
        labels, text_labels = self._labels[at_rows], self._text_labels[at_cols]
        ordered, order = text_labels.sort()
        count, first = _occurrences(labels, ordered)
        many = int(count.sum())
        if not many:
            return None
        if many >= DENSE * len(labels) * len(text_labels):
            positive = labels[:, None] == text_labels
            return Masked(positive.to(self._dtype), positive, (at_cols, at_rows))
        row = torch.repeat_interleave(
            count, output_size=many
        )  # each row's index as often as it has positives
        nth = torch.arange(many, device=self._device) - (count.cumsum(0) - count)[row]
        col = order[first[row] + nth] + at_cols.start
        return _listed(row + at_rows.start, col, at_rows, at_cols)

    def are_positive(self, row: Tensor, col: Tensor) -> Tensor:
        """Return whether each pair row[k], col[k] is a positive."""
        if self._labels is None or self._text_labels is None:
            return row == col
        return self._labels[row] == self._text_labels[col]


def _listed(row: Tensor, col: Tensor, at_rows: slice, at_cols: slice) -> Listed:
    width = at_cols.stop - at_cols.start
    return Listed((row - at_rows.start) * width + (col - at_cols.start), row, col)


def _occurrences(labels: Tensor, ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Return how often each label occurs in a sorted list, and where first."""
    first = torch.searchsorted(ordered, labels)
    return torch.searchsorted(ordered, labels, right=True) - first, first
