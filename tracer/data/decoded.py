"""Decoded pictures of evaluation sets, kept in memory for the next model that is evaluated on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tracer.data.config import LoadingSettings
from tracer.data.index import Index
from tracer.data.loader import load
from tracer.data.plan import LEFT_OUT, Plan, Work
from tracer.data.skipped import Skipped
from tracer.models.picture_format import PictureFormat


class DecodedPictures:
    """A store of decoded pictures, by data set and picture format.

    A set that does not fit any more is decoded anew each time. So is a set of which a file has changed.

    Args:
        limit: the most bytes to keep.
        loading: how pictures are decoded.
    """

    def __init__(self, limit: int = 256 * 2**20, loading: LoadingSettings | None = None):
        self._limit, self._loading = limit, loading or LoadingSettings()
        self._kept: dict[tuple[str, PictureFormat], tuple[Tensor, Tensor]] = {}

    def batches(
        self,
        index: Index,
        picture_format: PictureFormat,
        batch_size: int,
        workers: int,
        device: torch.device,
        skipped: Skipped | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all pictures in order, [≤ batch_size, 3, S, S] float32 on ``device``, with their numbers.

        A picture that cannot be read is noted in ``skipped`` and left out.

        Raises:
            UndecodableError: a picture cannot be read, and there is no ``skipped``; says which.
            UserError: more pictures cannot be read than ``skipped`` allows.
        """
        settings = replace(self._loading, workers=workers)
        plan = evaluation_plan(index, picture_format, batch_size, settings, device, skipped)
        size = len(index) * 3 * picture_format.size**2 * 4
        if size > self._limit:
            yield from _good(plan)
            return
        key = (index.digest(), picture_format)
        if key in self._kept:
            images, numbers = self._kept[key]
            parts = (part.to(device) for part in images.split(batch_size))
            yield from zip(parts, numbers.split(batch_size), strict=True)
            return
        room, kept = self._limit - sum(images.nbytes for images, _ in self._kept.values()), []
        for images, numbers in _good(plan):
            if size <= room:
                kept.append((images.cpu(), numbers))
            yield images, numbers
        # Where a picture failed, the next model decodes the set again and leaves it out too.
        if kept and sum(len(numbers) for _, numbers in kept) == len(index):
            images, numbers = (torch.cat(parts) for parts in zip(*kept, strict=True))
            self._kept[key] = images, numbers


def _good(plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a plan without the pictures that failed."""
    for images, rows in load(plan):
        good = rows != LEFT_OUT
        if bool(good.all()):
            yield images, rows
        elif bool(good.any()):
            yield images[good.to(images.device)], rows[good]


def evaluation_plan(
    index: Index,
    picture_format: PictureFormat,
    batch_size: int,
    settings: LoadingSettings,
    device: torch.device,
    skipped: Skipped | None = None,
) -> Plan:
    """Return the plan that shows every picture once, in order, as open_clip's transform for evaluation does.

    With ``skipped`` a picture that fails is noted there, and a blank one with the number ``LEFT_OUT`` stands in.
    """

    def work(number: int) -> Work:
        return Work(number, np.arange(number * batch_size, min((number + 1) * batch_size, len(index))))

    batches = range(-(-len(index) // batch_size))
    size = min(batch_size, len(index))
    return Plan(index, picture_format, settings, work, batches, size, skipped=skipped, device=device)
