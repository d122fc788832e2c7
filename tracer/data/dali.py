"""Pictures decoded, cropped, resized and normalised by a DALI pipeline, on the CPU or the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from tracer.models.picture_format import PictureFormat

# DALI fills these modules at import, where a type checker does not see it.
fn: Any = nvidia.dali.fn

dali_math: Any = nvidia.dali.math

types: Any = nvidia.dali.types


class Pictures:
    """Iterate over decoded pictures, batch by batch: ``(image, index)``.

    ``image`` [n, 3, S, S] float32 on ``device`` is normalised as ``picture_format`` says; ``index`` [n] int64 on
    the CPU holds the numbers of the pictures in ``index``.

    Args:
        index: the data set.
        picture_format: size, resizing and normalisation.
        batches: numbers of the pictures of each batch.
        batch_size: the largest length of a batch.
        crops: random crops of each batch, from :func:`~tracer.data.order.random_crops`, for training. Without
            them pictures are resized, and the centre cropped, as by open_clip's transform for evaluation.
        workers: threads that decode.
        device: where the pipeline runs, decoding included.
    """

    def __init__(
        self,
        index: Index,
        picture_format: PictureFormat,
        batches: Iterator[np.ndarray],
        batch_size: int,
        *,
        crops: Iterator[Crops] | None = None,
        workers: int = 2,
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)

        def read() -> Iterator[tuple[Any, ...]]:
            for rows in batches:
                files = [np.fromfile(index.images[i], np.uint8) for i in rows]
                yield files, list(rows[:, None]), *(next(crops) if crops else ())

        gpu: Any = self.device.index or 0 if self.device.type == "cuda" else None  # None: no CUDA at all
        decorate = pipeline_def(batch_size=batch_size, num_threads=workers, device_id=gpu)
        pipeline = decorate(_pictures)(
            read, picture_format, cropped=crops is not None, on_gpu=gpu is not None
        )
        self._iterator = DALIGenericIterator(pipeline, ["image", "index"], auto_reset=False)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for (batch,) in self._iterator:
            yield batch["image"].to(self.device), batch["index"].flatten()


def _pictures(
    read: Callable[[], Iterator[tuple[Any, ...]]], wanted: PictureFormat, cropped: bool, on_gpu: bool
) -> tuple[Any, Any]:
    """DALI nodes of a whole pipeline: normalised pictures and their numbers, from what ``read`` yields."""
    inputs = 4 if cropped else 2  # files, numbers, and the two parts of the crops
    encoded, rows, *crop = fn.external_source(
        read,
        num_outputs=inputs,
        dtype=[types.UINT8, types.INT64, types.FLOAT, types.FLOAT][:inputs],
        ndim=[1, 1, 2, 1][:inputs],
    )
    image = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
    image = _resized(image, encoded, wanted, crop)
    image = fn.crop_mirror_normalize(
        image,
        crop=(wanted.size, wanted.size),
        mean=[255 * m for m in wanted.mean],
        std=[255 * s for s in wanted.std],
        output_layout="CHW",
        dtype=types.FLOAT,
    )
    return image, rows


def _resized(image: Any, encoded: Any, wanted: PictureFormat, crop: list[Any]) -> Any:
    """DALI nodes: the picture, or the crop of it, resized; the longer side may still be larger than the size."""
    kernel = types.INTERP_CUBIC if wanted.interpolation == "bicubic" else types.INTERP_LINEAR
    sampling = {"interp_type": kernel, "antialias": True}
    square = [wanted.size, wanted.size]
    if crop:
        start, end = _window(encoded, *crop)
        return fn.resize(image, size=square, roi_start=start, roi_end=end, roi_relative=True, **sampling)
    if wanted.resize_mode == "squash":
        return fn.resize(image, size=square, **sampling)
    shape = fn.peek_image_shape(encoded, dtype=types.FLOAT)[:2]
    size = dali_math.floor(shape * wanted.size / fn.reductions.min(shape))  # down, as torchvision rounds
    return fn.resize(image, size=size, **sampling)


def _window(encoded: Any, sides: Any, place: Any) -> tuple[Any, Any]:
    """DALI nodes: first and last corner of the crop, [2] float32 each, relative to the picture's height and width.

    The crop is the first attempt that fits the picture, and where none does, as much of the picture as RATIO
    allows. This is the distribution of torchvision's RandomResizedCrop, except that torchvision rounds to whole
    pixels and centres a crop of the second kind.
    """
    shape = fn.peek_image_shape(encoded, dtype=types.FLOAT)[:2]
    unit = (
        dali_math.sqrt(shape[0] * shape[1]) / shape
    )  # side of the square of that area, relative to each side
    sides = sides * fn.expand_dims(unit, axes=1)
    fits = fn.reductions.max(sides, axes=0) <= 1.0
    rank = fits * types.Constant(np.arange(ATTEMPTS, 0, -1, dtype=np.float32))  # the first is the highest
    best = fn.reductions.max(rank)
    largest = dali_math.min(RATIO * unit * unit, 1.0)
    size = fn.reductions.sum(sides * (rank == best), axes=1) * (best > 0.0) + largest * (best == 0.0)
    start = place * (1.0 - size)
    return start, start + size
