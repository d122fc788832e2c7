"""Decoded pictures of evaluation sets, kept in memory for the next model that is evaluated on them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tracer.data.dali import Pictures
from tracer.data.index import Index
from tracer.data.order import in_order
from tracer.models.picture_format import PictureFormat


class DecodedPictures:
    """A store of decoded pictures, by data set and picture format.

    A set that does not fit any more is decoded anew each time. So is a set of which a file has changed.

    Args:
        limit: the most bytes to keep.
    """

    def __init__(self, limit: int = 256 * 2**20):
        self._limit = limit
        self._kept: dict[tuple[str, PictureFormat], Tensor] = {}

    def batches(
        self, index: Index, picture_format: PictureFormat, batch_size: int, workers: int, device: torch.device
    ) -> Iterator[Tensor]:
        """Yield all pictures in order, [≤ batch_size, 3, S, S] float32 on ``device``."""
        key = (index.digest(), picture_format)
        if key not in self._kept:
            order = in_order(len(index), batch_size)
            pictures = Pictures(index, picture_format, order, batch_size, workers=workers, device=device)
            size = len(index) * 3 * picture_format.size**2 * 4
            if size + sum(kept.nbytes for kept in self._kept.values()) > self._limit:
                yield from (image for image, _ in pictures)
                return
            self._kept[key] = torch.cat([image.cpu() for image, _ in pictures])
        yield from (image.to(device) for image in self._kept[key].split(batch_size))
