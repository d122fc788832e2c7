"""The loader ``dali``: a DALI pipeline decodes, crops, resizes and normalises, on the CPU or the GPU."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np
import nvidia.dali
import nvidia.dali.fn
import nvidia.dali.math
import nvidia.dali.types
import torch
from nvidia.dali import pipeline_def
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor

from tracer.data.ahead import Ahead
from tracer.data.changed import GRAY
from tracer.data.picture import Picture, for_dali, ppm, what_pil_says
from tracer.data.plan import LEFT_OUT, Plan, Work
from tracer.data.window import WHOLE, centre_window, pixels_of, random_window
from tracer.errors import UserError
from tracer.models.picture_format import PictureFormat

# DALI fills these modules at import, where a type checker does not see it.
fn: Any = nvidia.dali.fn
types: Any = nvidia.dali.types
dali_math: Any = nvidia.dali.math

AHEAD = 8  # more batches than a pipeline's queues hold

Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]  # a file, and the two ends of what is shown of it


class Pictures:
    """Iterate over the batches of a plan: ``(image, rows)``; see :func:`~tracer.data.loader.load`.

    Threads read files and windows ahead of the pipeline. A file that DALI cannot decode ends its pipeline: the
    culprit is then searched in the batches that the pipeline held, and a new pipeline begins at the first of them.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._held: deque[tuple[Work, list[int]]] = deque(
            maxlen=AHEAD
        )  # batches that DALI may hold, and their rows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        numbers = self._plan.numbers
        while numbers:
            try:
                for image, rows in self._batches(numbers):
                    yield image, rows
                    numbers = numbers[1:]
                return
            except RuntimeError as error:
                self._note_culprits(numbers[0], error)

    def _batches(self, numbers: range) -> Iterator[tuple[Tensor, Tensor]]:
        plan, gpu = self._plan, _gpu(self._plan.device)
        self._held.clear()
        decorate = pipeline_def(batch_size=plan.size, num_threads=plan.settings.workers, device_id=gpu)
        first, reader = plan.work(numbers[0]), self._read(numbers)
        pipeline = decorate(_pictures)(
            reader, plan.picture_format, gpu is not None, exif=plan.settings.exif, first=first
        )
        try:
            batches = DALIGenericIterator(pipeline, ["image", "index"], auto_reset=False)
            for (batch,) in batches:
                yield batch["image"].to(plan.device), batch["index"].flatten()
        finally:
            reader.close()

    def _read(self, numbers: range) -> Generator[tuple[Any, ...], None, None]:
        """Yield the inputs of DALI for each batch: files, numbers, both corners of windows, and changes."""
        plan = self._plan

        def one(work: Work, place: int) -> tuple[int, Encoded]:
            return plan.first_good(work, place, lambda row: self._encoded(work, place, row), _blank)

        def some(work: Work, places: range) -> list[tuple[int, Encoded]]:
            return [one(work, place) for place in places]

        batches = Ahead(map(plan.work, numbers), len, some, plan.settings.workers)
        for work, results in batches:
            rows = [row for row, _ in results]
            self._held.append((work, rows))
            files, starts, ends = zip(*(encoded for _, encoded in results), strict=True)
            inputs = list(files), list(np.array(rows)[:, None]), np.stack(starts), np.stack(ends)
            yield *inputs, *_changes(work)

    def _encoded(self, work: Work, place: int, row: int) -> Encoded:
        """Return a file that DALI decodes, and what is shown: a window in shares, or a crop in whole pixels."""
        plan = self._plan
        picture, wanted = plan.read(row), plan.picture_format
        if work.crops is None:
            encoded, window = for_dali(picture, centre_window(picture.shape, wanted), wanted)
            return encoded, window.start, window.end
        encoded, window = for_dali(picture, random_window(picture.shape, *work.crop(place)), wanted)
        shape = picture.shape if picture.transparent is None else (wanted.size, wanted.size)
        top, left, height, width = pixels_of(shape, window)
        return encoded, np.array([top, left], np.float32), np.array([height, width], np.float32)

    def _note_culprits(self, first: int, error: RuntimeError) -> None:
        """Find the pictures of the batches from ``first`` on that cannot be decoded, and note them as failed.

        Raises:
            RuntimeError: ``error`` itself, where every picture can be decoded: it has another reason.
        """
        plan, searched = self._plan, dict[int, int]()
        for work, rows in self._held:
            for row in rows if work.number >= first else ():
                if row != LEFT_OUT:
                    searched.setdefault(row, work.number)
        culprits = self._undecodable(searched)
        if not culprits:
            raise error
        for row, reason in culprits.items():
            plan.fail(row, searched[row], UserError(reason))

    def _undecodable(self, rows: Iterable[int]) -> dict[int, str]:
        """Return those pictures that DALI cannot decode by themselves, with what it says."""
        plan, waiting, culprits = self._plan, deque(rows), {}
        while waiting:
            done: list[int] = []

            def files(done: list[int] = done) -> Iterator[list[np.ndarray]]:
                while waiting:
                    done.append(waiting.popleft())
                    picture = self._read_again(done[-1])
                    if picture is not None and picture.content is not None:
                        yield [np.frombuffer(picture.content, np.uint8)]

            try:
                decode(files(), plan.device)
            except RuntimeError as error:
                picture = self._read_again(done[-1])
                culprits[done[-1]] = _reason(picture.content if picture else None, error)
        return culprits

    def _read_again(self, row: int) -> Picture | None:
        try:
            return self._plan.read(row)
        except (UserError, OSError):  # it has vanished meanwhile, and the next pipeline will note it
            return None


def decode(batches: Iterator[list[np.ndarray]], device: torch.device) -> None:
    """Decode encoded pictures one after the other, each when the one before is decoded.

    Raises:
        RuntimeError: DALI cannot decode one of them: the last one that was asked for.
    """

    def pipeline() -> Any:
        encoded = fn.external_source(batches, dtype=types.UINT8, ndim=1)
        return _decoded(encoded, device.type == "cuda", False).shape()

    one_by_one: dict[str, Any] = {"exec_dynamic": False, "exec_async": False, "exec_pipelined": False}
    decorate: Any = pipeline_def(batch_size=1, num_threads=1, device_id=_gpu(device), **one_by_one)
    decoder = decorate(pipeline)()
    with contextlib.suppress(StopIteration):  # the end of the batches
        while True:
            decoder.run()


def _blank() -> Encoded:
    """Return a black pixel, which stands in for a picture that failed; all of any window is in it."""
    return ppm(np.zeros((1, 1, 3), np.uint8)), WHOLE.start, WHOLE.end


def _changes(work: Work) -> tuple[np.ndarray, ...]:
    """Return whether each picture of a batch is mirrored [n] int32, and its colours' factors [n, 3], if any."""
    if work.changes is None:
        return ()
    flipped, factors = work.changes.flipped.astype(np.int32), work.changes.factors
    return (flipped,) if factors is None else (flipped, factors)


def _reason(content: bytes | None, error: RuntimeError) -> str:
    """Return in words why a file cannot be decoded; DALI's own are a trace of its nodes."""
    said = what_pil_says(content) if content else None
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return said or f"DALI cannot decode it, though PIL can: {lines[-1][:200] if lines else ''}"


def _gpu(device: torch.device) -> Any:
    return (device.index or 0) if device.type == "cuda" else None  # None: no CUDA at all


def _decoded(encoded: Any, on_gpu: bool, exif: bool) -> Any:
    return fn.decoders.image(
        encoded,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=exif,
        jpeg_fancy_upsampling=True,  # as libjpeg does by itself; nvJPEG does not
    )


def _pictures(read: Any, wanted: PictureFormat, on_gpu: bool, *, exif: bool, first: Work) -> tuple[Any, Any]:
    """DALI nodes of a whole pipeline: normalised pictures and their numbers, from what ``read`` yields.

    ``first`` is its first batch: all of them have crops or none, and so with changes.
    """
    changes = len(_changes(first))
    kinds = [types.UINT8, types.INT64, types.FLOAT, types.FLOAT, *[types.INT32, types.FLOAT][:changes]]
    encoded, rows, start, end, *drawn = fn.external_source(
        read, num_outputs=len(kinds), dtype=kinds, ndim=[1, 1, 1, 1, *[0, 1][:changes]]
    )
    kernel = types.INTERP_CUBIC if wanted.interpolation == "bicubic" else types.INTERP_LINEAR
    image, size = _decoded(encoded, on_gpu, exif), [wanted.size, wanted.size]
    if (
        first.crops is not None
    ):  # cut out, then resized, as torchvision does: the pixels around have no part in it
        image = fn.slice(image, start, end, axes=[0, 1], normalized_anchor=False, normalized_shape=False)
        image = fn.resize(image, size=size, interp_type=kernel, antialias=True)
    else:
        image = fn.resize(
            image,
            size=size,
            roi_start=start,
            roi_end=end,
            roi_relative=True,
            interp_type=kernel,
            antialias=True,
        )
    if changes == 2:
        image = _coloured(image, drawn[1].gpu() if on_gpu else drawn[1])
    image = fn.crop_mirror_normalize(
        image,
        mirror=drawn[0] if drawn else 0,
        mean=[255 * m for m in wanted.mean],
        std=[255 * s for s in wanted.std],
        output_layout="CHW",
        dtype=types.FLOAT,
    )
    return image, rows


def _coloured(image: Any, factors: Any) -> Any:
    """DALI nodes of :func:`tracer.data.changed.changed`: levels [S, S, 3] uint8 with other colours, as float."""

    def clamped(levels: Any) -> Any:
        return dali_math.clamp(levels, 0.0, 255.0)

    def gray(levels: Any) -> Any:
        red, green, blue = (levels[:, :, n : n + 1] for n in range(3))
        return GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue

    brightness, contrast, saturation = (factors[n] for n in range(3))
    image = clamped(fn.cast(image, dtype=types.FLOAT) * brightness)
    image = clamped(contrast * image + (1.0 - contrast) * fn.reductions.mean(gray(image)))
    return clamped(saturation * image + (1.0 - saturation) * gray(image))
