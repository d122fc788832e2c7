"""Pictures decoded, cropped, resized and normalised by a DALI pipeline, on the CPU or the GPU."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali
import nvidia.dali.fn
import nvidia.dali.types
import torch
from nvidia.dali import pipeline_def
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor

from tracer.data.index import Index
from tracer.data.order import Crops
from tracer.data.picture import UndecodableError, for_dali, read_picture, what_pil_says
from tracer.data.window import centre_window, random_window
from tracer.models.picture_format import PictureFormat

# DALI fills these modules at import, where a type checker does not see it.
fn: Any = nvidia.dali.fn

types: Any = nvidia.dali.types

VERSION: str = nvidia.dali.__version__

AHEAD = 8  # more batches than a pipeline's queues hold


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

    Raises:
        UndecodableError: here or while iterating, for a picture that cannot be decoded; names it.
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
        self.device, self._index, self._format = torch.device(device), index, picture_format
        self._recent: deque[np.ndarray] = deque(maxlen=AHEAD)  # numbers of the pictures that DALI may hold
        self._pool = ThreadPoolExecutor(workers)
        source = self._read(batches, crops)
        gpu = _gpu(self.device)
        decorate = pipeline_def(batch_size=batch_size, num_threads=workers, device_id=gpu)
        pipeline = decorate(_pictures)(source, picture_format, gpu is not None)
        with self._named():
            self._iterator = DALIGenericIterator(pipeline, ["image", "index"], auto_reset=False)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = iter(self._iterator)
        while True:
            with self._named():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch[0]["image"].to(self.device), batch[0]["index"].flatten()

    def _read(
        self, batches: Iterator[np.ndarray], crops: Iterator[Crops] | None
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the inputs of DALI for each batch: files, numbers, and the windows' first and last corners."""

        def load(row: int, *crop: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            picture = read_picture(self._index.images[row])
            shape = picture.shape
            window = random_window(shape, *crop) if crop else centre_window(shape, self._format)
            encoded, window = for_dali(picture, window, self._format)
            return encoded, window.start, window.end

        for rows in batches:
            self._recent.append(rows)
            files, starts, ends = zip(
                *self._pool.map(load, rows, *(next(crops) if crops else ())), strict=True
            )
            yield list(files), list(rows[:, None]), np.stack(starts), np.stack(ends)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Turn an error of the pipeline into one that names the picture, where a picture is the reason."""
        try:
            yield
        except RuntimeError:
            recent = dict.fromkeys(self._index.images[row] for batch in self._recent for row in batch)
            faults = undecodable(recent, self.device)
            for path, reason in faults.items():
                raise UndecodableError(path, reason) from None
            raise


def undecodable(paths: Iterable[Path], device: torch.device) -> dict[Path, str]:
    """Return what is wrong with those of the files that cannot be decoded one by one, by their path."""
    faults = {}
    for path in paths:
        try:
            picture = read_picture(path)
            if picture.encoded is not None:
                decode([[picture.encoded]], device, workers=1, batch_size=1)
        except UndecodableError as error:
            faults[path] = error.reason
        except RuntimeError:
            faults[path] = (
                what_pil_says(path) or "DALI's decoder refuses it, though PIL reads it: save it again"
            )
    return faults


def decode(batches: Iterable[list[np.ndarray]], device: torch.device, workers: int, batch_size: int) -> None:
    """Decode batches of encoded pictures, at most ``batch_size`` in each, as the training pipeline does.

    A batch is read when the one before it is decoded and forgotten.

    Raises:
        RuntimeError: DALI cannot decode one of them.
    """

    def pipeline() -> Any:
        encoded = fn.external_source(iter(batches), dtype=types.UINT8, ndim=1)
        return _decoded(encoded, device.type == "cuda").shape()

    decorate = pipeline_def(
        batch_size=batch_size, num_threads=workers, device_id=_gpu(device), prefetch_queue_depth=1
    )
    decoder = decorate(pipeline)()
    with contextlib.suppress(StopIteration):  # the end of the batches
        while True:
            decoder.run()


def _gpu(device: torch.device) -> Any:
    return (device.index or 0) if device.type == "cuda" else None  # None: no CUDA at all


def _decoded(encoded: Any, on_gpu: bool) -> Any:
    return fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)


def _pictures(read: Any, wanted: PictureFormat, on_gpu: bool) -> tuple[Any, Any]:
    """DALI nodes of a whole pipeline: normalised pictures and their numbers, from what ``read`` yields."""
    encoded, rows, start, end = fn.external_source(
        read, num_outputs=4, dtype=[types.UINT8, types.INT64, types.FLOAT, types.FLOAT], ndim=[1, 1, 1, 1]
    )
    kernel = types.INTERP_CUBIC if wanted.interpolation == "bicubic" else types.INTERP_LINEAR
    image = fn.resize(
        _decoded(encoded, on_gpu),
        size=[wanted.size, wanted.size],
        roi_start=start,
        roi_end=end,
        roi_relative=True,
        interp_type=kernel,
        antialias=True,
    )
    image = fn.crop_mirror_normalize(
        image,
        mean=[255 * m for m in wanted.mean],
        std=[255 * s for s in wanted.std],
        output_layout="CHW",
        dtype=types.FLOAT,
    )
    return image, rows
