"""Decoded pictures batch by batch, whichever loader decodes them; a picture that fails does not end a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tracer.data.config import LoadingSettings
from tracer.data.index import Index
from tracer.data.names import note
from tracer.data.order import Crops, Order
from tracer.data.picture import Picture, UndecodableError, read_picture, reason_of
from tracer.data.skipped import Skipped
from tracer.errors import UserError
from tracer.models.picture_format import PictureFormat

T = TypeVar("T")


@dataclass
class Work:
    """A batch to be loaded.

    Attributes:
        number: of the batch.
        rows: numbers of its pictures in the data set [n] int64.
        crops: their random crops; None shows the centre, as open_clip's transform for evaluation does.
        place: of the first picture within the global batch, of which a rank loads a part.
    """

    number: int
    rows: np.ndarray
    crops: Crops | None = None
    place: int = 0

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
        order, skipped: a picture that fails is noted in ``skipped``, and the next one of ``order`` stands in.
            Without them it raises :class:`~tracer.data.picture.UndecodableError`.
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
        return read_picture(content, self.index.id(row), exif=settings.exif, max_pixels=settings.max_pixels)

    def first_good(self, work: Work, place: int, load: Callable[[int], T]) -> tuple[int, T]:
        """Return the picture at a place of a batch, or its stand-in, and what ``load`` makes of it.

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
            attempt += 1
            assert self.order is not None
            row = self.order.instead(work.number, work.place + place, attempt)

    def fail(self, row: int, batch: int, error: Exception) -> None:
        """Note that a picture failed, or raise where nothing may stand in for it."""
        reason = error.reason if isinstance(error, UndecodableError) else reason_of(error)
        if self.order is None or self.skipped is None:
            raise UndecodableError(self.index.id(row), reason, row) from error
        self.skipped.add(row, batch, self.index.id(row), reason)


def load(plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the batches of a plan: ``(image, rows)``.

    ``image`` [n, 3, S, S] float32 on the plan's device is normalised as its picture format says; ``rows`` [n]
    int64 on the CPU holds the numbers of the pictures in the index.

    Raises:
        UserError: DALI is asked for and missing, or pictures cannot be decoded; see :class:`Plan`.
    """
    if not plan.numbers:
        return iter(())
    name, _ = choose(plan.settings, plan.device)
    if name == "dali":
        from tracer.data.dali import Pictures

        return iter(Pictures(plan))
    from tracer.data.threads import pictures

    return pictures(plan)


def choose(settings: LoadingSettings, device: torch.device) -> tuple[str, str]:
    """Return the loader that ``settings`` lead to on a device, torch or dali, and why.

    Raises:
        UserError: the settings exclude each other, or DALI is not installed.
    """
    has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali")
    if settings.loader == "dali":
        if settings.jpeg == "scaled":
            raise UserError("--jpeg scaled needs --loader torch: DALI decodes a JPEG at its whole size only")
        if not has_dali:
            raise UserError(
                "--loader dali needs DALI: pip install 'tracer-clip[dali]', or use --loader torch"
            )
        return "dali", "--loader dali"
    if settings.loader == "torch":
        return "torch", "--loader torch"
    if device.type != "cuda":
        return "torch", "there is no GPU"
    if settings.jpeg == "scaled":
        return "torch", "--jpeg scaled"
    if not has_dali:
        return "torch", "DALI is not installed"
    return "dali", "there is a GPU"


def announce(
    index: Index, picture_format: PictureFormat, settings: LoadingSettings, device: torch.device
) -> None:
    """Print which loader runs and why, and what it does with pictures that other programs may show otherwise."""
    name, why = choose(settings, device)
    note(f"loader {name} ({why})")
    about = index.about
    if about.turned:
        done = "turned upright" if settings.exif else "shown as they are stored (--exif true turns them)"
        note(f"'{index.name}': {about.turned} pictures with an EXIF rotation are {done}")
    if about.sixteen:
        note(f"'{index.name}': {about.sixteen} pictures of 16 bits a channel are scaled to 8")
    if settings.jpeg == "scaled":
        from tracer.data.threads import effect_of_scaling

        note(f"'{index.name}': {effect_of_scaling(index, picture_format, settings)}")
