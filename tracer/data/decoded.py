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
from tracer.data.plan import Plan, Work
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
        self._kept: dict[tuple[str, PictureFormat], Tensor] = {}

    def batches(
        self, index: Index, picture_format: PictureFormat, batch_size: int, workers: int, device: torch.device
    ) -> Iterator[Tensor]:
        """Yield all pictures in order, [≤ batch_size, 3, S, S] float32 on ``device``.

        Raises:
            UndecodableError: a picture cannot be read; says which.
        """
        size = len(index) * 3 * picture_format.size**2 * 4
        if size > self._limit:
            yield from self._decoded(index, picture_format, batch_size, workers, device)
            return
        key = (index.digest(), picture_format)
        if key not in self._kept:
            if size + sum(kept.nbytes for kept in self._kept.values()) > self._limit:
                yield from self._decoded(index, picture_format, batch_size, workers, device)
                return
            pictures = self._decoded(index, picture_format, batch_size, workers, device)
            self._kept[key] = torch.cat([image.cpu() for image in pictures])
        yield from (image.to(device) for image in self._kept[key].split(batch_size))

    def _decoded(
        self, index: Index, picture_format: PictureFormat, batch_size: int, workers: int, device: torch.device
    ) -> Iterator[Tensor]:
        plan = evaluation_plan(
            index, picture_format, batch_size, replace(self._loading, workers=workers), device
        )
        return (image for image, _ in load(plan))


def evaluation_plan(
    index: Index,
    picture_format: PictureFormat,
    batch_size: int,
    settings: LoadingSettings,
    device: torch.device,
) -> Plan:
    """Return the plan that shows every picture once, in order, as open_clip's transform for evaluation does."""

    def work(number: int) -> Work:
        return Work(number, np.arange(number * batch_size, min((number + 1) * batch_size, len(index))))

    batches = range(-(-len(index) // batch_size))
    return Plan(index, picture_format, settings, work, batches, min(batch_size, len(index)), device=device)
