"""What a loader loads: batches of pictures, their changes, and what stands in for a picture that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from tracer.data.config import LoadingSettings
from tracer.data.index import Index
from tracer.data.order import Changes, Crops, Order
from tracer.data.picture import Picture, UndecodableError, read_picture, reason_of, without_border
from tracer.data.skipped import Skipped
from tracer.errors import UserError
from tracer.models.picture_format import PictureFormat

T = TypeVar("T")
LEFT_OUT = -1  # the number of a blank picture, in the place of one that failed in evaluation


@dataclass
class Work:
    """A batch to be loaded.

    Attributes:
        number: of the batch.
        rows: numbers of its pictures in the data set [n] int64.
        crops: their random crops; None shows the centre, as open_clip's transform for evaluation does.
        place: of the first picture within the global batch, of which a rank loads a part.
        changes: how they are changed after the crop; None: not at all.
    """

    number: int
    rows: np.ndarray
    crops: Crops | None = None
    place: int = 0
    changes: Changes | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def crop(self, place: int) -> tuple[np.ndarray, ...]:
        """Return the random numbers of one picture's crop."""
        assert self.crops is not None
        return tuple(part[place] for part in self.crops)


@dataclass
class Plan:
    """What a loader loads.

    Attributes:
        index: the data set.
        picture_format: size, resizing and normalisation.
        settings: how pictures are decoded.
        work: returns the batch of a number.
        numbers: of the batches.
        size: the largest length of a batch.
        order, skipped: a picture that fails is noted in ``skipped``, and the next one of ``order`` stands in;
            without an order a blank one does, whose number is :data:`LEFT_OUT`. Without ``skipped`` it raises
            :class:`~tracer.data.picture.UndecodableError`.
        device: where the batches are put, and where DALI decodes.
    """

    index: Index
    picture_format: PictureFormat
    settings: LoadingSettings
    work: Callable[[int], Work]
    numbers: range
    size: int
    order: Order | None = None
    skipped: Skipped | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def read(self, row: int) -> Picture:
        """Read a picture.

        Raises:
            UserError, OSError: it cannot be read.
        """
        settings = self.settings
        content = self.index.read(row)
        try:
            picture = read_picture(content, "", exif=settings.exif, max_pixels=settings.max_pixels)
            return without_border(picture, self.index.border, "", exif=settings.exif)
        except UndecodableError as error:
            raise UndecodableError(self.index.id(row), error.reason, row) from error

    def first_good(
        self, work: Work, place: int, load: Callable[[int], T], blank: Callable[[], T]
    ) -> tuple[int, T]:
        """Return the picture at a place of a batch, or its stand-in, and what ``load`` makes of it.

        ``blank`` makes the stand-in where there is no order.

        Raises:
            UndecodableError: it cannot be read, and nothing may stand in.
            UserError: too many pictures have failed.
        """
        row, attempt = int(work.rows[place]), 0
        while True:
            if self.skipped is None or not self.skipped.has(row, work.number):
                try:
                    return row, load(row)
                except (UserError, OSError) as error:
                    self.fail(row, work.number, error)
            if self.order is None:
                return LEFT_OUT, blank()
            attempt += 1
            row = self.order.instead(work.number, work.place + place, attempt)

    def fail(self, row: int, batch: int, error: Exception) -> None:
        """Note that a picture failed, or raise where nothing may stand in for it."""
        reason = error.reason if isinstance(error, UndecodableError) else reason_of(error)
        if self.skipped is None:
            raise UndecodableError(self.index.id(row), reason, row) from error
        self.skipped.add(row, batch, self.index.id(row), reason)
