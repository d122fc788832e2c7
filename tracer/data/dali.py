"""Pictures decoded, cropped and normalised by a DALI pipeline, on the CPU or the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import nvidia.dali.fn
import nvidia.dali.math
import nvidia.dali.types
import torch
from nvidia.dali import pipeline_def
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor

from tracer.data.index import Index
from tracer.data.order import ATTEMPTS, RATIO, Crops
from tracer.models.clip import Clip

# DALI makes these modules' content at import, where a type checker does not see it.
fn: Any = nvidia.dali.fn

dali_math: Any = nvidia.dali.math

types: Any = nvidia.dali.types


def _window(encoded: Any, sides: Any, place: Any) -> tuple[Any, Any]:
    """DALI nodes: corners of the crop in shares of the picture's height and width, [2] float32 each.

    The first attempt that fits the picture, and where none does, as much of it as RATIO allows: the distribution
    of torchvision's RandomResizedCrop, but for its rounding to whole pixels, and that it centres the latter.
    """
    shape = fn.peek_image_shape(encoded, dtype=types.FLOAT)[:2]
    unit = dali_math.sqrt(shape[0] * shape[1]) / shape  # from sides of that square to shares
    sides = sides * fn.expand_dims(unit, axes=1)
    fits = fn.reductions.max(sides, axes=0) <= 1.0
    rank = fits * types.Constant(np.arange(ATTEMPTS, 0, -1, dtype=np.float32))  # the first is the highest
    best = fn.reductions.max(rank)
    largest = dali_math.min(RATIO * unit * unit, 1.0)
    size = fn.reductions.sum(sides * (rank == best), axes=1) * (best > 0.0) + largest * (best == 0.0)
    start = place * (1.0 - size)
    return start, start + size


class Pictures:
    """Decoded pictures in the order of ``batches``: yields ``(image, index)`` tensors on ``device``.

    Training gives ``crops``, from :func:`random_crops` for each of the batches; evaluation (None) resizes the
    shorter side and crops the centre, as open_clip's own transforms do.
    """

    def __init__(
        self,
        index: Index,
        clip: Clip,
        batches: Iterator[np.ndarray],
        batch_size: int,
        *,
        crops: Iterator[Crops] | None = None,
        workers: int = 2,
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)
        gpu: Any = self.device.index or 0 if self.device.type == "cuda" else None  # None: no CUDA at all

        def read() -> Iterator[tuple[Any, ...]]:
            for rows in batches:
                files = [np.fromfile(index.images[i], np.uint8) for i in rows]
                yield files, list(rows[:, None]), *(next(crops) if crops else ())

        inputs = 4 if crops else 2

        @pipeline_def(batch_size=batch_size, num_threads=workers, device_id=gpu)
        def pipeline() -> tuple[Any, Any]:
            encoded, rows, *crop = fn.external_source(
                read,
                num_outputs=inputs,
                dtype=[types.UINT8, types.INT64, types.FLOAT, types.FLOAT][:inputs],
                ndim=[1, 1, 2, 1][:inputs],
            )
            decoder = "cpu" if gpu is None else "mixed"
            image = fn.decoders.image(encoded, device=decoder, output_type=types.RGB)
            kind = types.INTERP_CUBIC if clip.interpolation == "bicubic" else types.INTERP_LINEAR
            sampling = {"interp_type": kind, "antialias": True}
            side = clip.image_size
            if crop:
                start, end = _window(encoded, *crop)
                window = {"roi_start": start, "roi_end": end, "roi_relative": True}
                image = fn.resize(image, size=[side, side], **window, **sampling)
            elif clip.squash:
                image = fn.resize(image, size=[side, side], **sampling)
            else:
                shape = fn.peek_image_shape(encoded, dtype=types.FLOAT)[:2]
                size = dali_math.floor(shape * side / fn.reductions.min(shape))  # down, as torchvision rounds
                image = fn.resize(image, size=size, **sampling)
            image = fn.crop_mirror_normalize(
                image,
                crop=(side, side),
                mean=[255 * m for m in clip.mean],
                std=[255 * s for s in clip.std],
                output_layout="CHW",
                dtype=types.FLOAT,
            )
            return image, rows

        self._iterator = DALIGenericIterator(pipeline(), ["image", "index"], auto_reset=False)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for (batch,) in self._iterator:
            yield batch["image"].to(self.device), batch["index"].flatten()
