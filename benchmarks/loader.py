"""Pictures per second of the package's loader, against PIL and torch's DataLoader, with the same pixels.

    python -m benchmarks.loader                         JPEGs to 224×224, the demo's icons to 40×40
    python -m benchmarks.loader --quick
    python -m benchmarks.loader --workers 1 --repeats 9

Each turn is an epoch from the files to batches of normalised float tensors: random crops of at least 0.9 of the
area, resized, with new order and crops every time. Pipelines are built and emptied within their turn, so that
no loader works ahead during another's time; only torch's worker processes stay alive. All loaders get the same
cores, as threads in DALI and in the package, as processes in the DataLoader. Before anything is timed, the
pixels of the evaluation's transform, which has no randomness, are compared with PIL's, in levels of 255. The
processor's time for a picture, of all threads and worker processes together, stands beside the clock's: other
work on the machine changes it less. The files are in ``pictures.py``.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali
import nvidia.dali.fn
import nvidia.dali.math
import nvidia.dali.types
import open_clip
import psutil
import torch
from matplotlib.figure import Figure
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from benchmarks import plots
from benchmarks.harness import Highlight, command_line, progress, table
from benchmarks.measure import Timing, WrongResult, interleaved
from benchmarks.pictures import CROP, Source, sources
from tracer.data.batches import TrainingBatches
from tracer.data.config import LoadingSettings
from tracer.data.decoded import evaluation_plan
from tracer.data.index import Index
from tracer.data.loader import load
from tracer.data.order import in_order, shuffled
from tracer.models.clip import Clip

fn: Any = nvidia.dali.fn
types: Any = nvidia.dali.types
dali_math: Any = nvidia.dali.math
pipeline_def: Any = nvidia.dali.pipeline_def

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SAME = (0.5, 16)  # largest mean and single difference of pixels that are called the same, of 255 levels
CHECKED = 32  # pictures whose pixels are compared

OURS, SCALED, OURS_DALI, PIL = "tracer", "tracer, --jpeg scaled", "tracer, --loader dali", "PIL, DataLoader"
ALONE, TORCHVISION, CUBIC = "PIL, DataLoader in the main process", "torchvision, DataLoader", "DALI alone"
LINEAR, DECODED, ON_GPU = (
    "DALI, linear without antialias",
    "DALI, decoding only",
    "tracer, --loader dali, decoding on the GPU",
)


PICTURES = {
    "pictures-per-second": "Bar charts: pictures per second of each loader, for large JPEGs and for small icons."
}


# ---------------------------------------------------------------------------------------------------
# The loaders.


class Entrant(NamedTuple):
    """A loader: an epoch of training, and the first pictures as the evaluation transforms them."""

    epoch: Callable[[], Iterable[Tensor]]
    evaluation: Callable[[], Tensor] | None
    same: bool  # whether the pixels must be PIL's


def entrants(source: Source, workers: int) -> dict[str, Entrant]:
    """Return all loaders by name."""
    cubic = {"interp_type": types.INTERP_CUBIC, "antialias": True}
    with_open_clip = partial(open_clip_transform, source.clip)
    loaders = {
        PIL: torch_loader(source, with_pil, with_open_clip, workers),
        ALONE: torch_loader(source, with_pil, with_open_clip, 0),
        TORCHVISION: torch_loader(
            source, with_torchvision, partial(torchvision_transform, source.clip), workers
        ),
        OURS: tracer_loader(source, workers, "cpu", LoadingSettings(loader="torch")),
        SCALED: tracer_loader(source, workers, "cpu", LoadingSettings(loader="torch", jpeg="scaled")),
        OURS_DALI: tracer_loader(source, workers, "cpu", LoadingSettings(loader="dali")),
        CUBIC: dali_loader(source, workers, **cubic),
        LINEAR: dali_loader(source, workers, interp_type=types.INTERP_LINEAR, antialias=False),
        DECODED: dali_loader(source, workers),
    }
    if source.files[0].suffix == ".png" or source.side * 4.5 > min(Image.open(source.files[0]).size):
        del loaders[SCALED]  # a crop of these files is never twice as large as half of it
    on_gpu = {ON_GPU: tracer_loader(source, workers, "cuda", LoadingSettings(loader="dali"))} if GPU else {}
    return loaders | on_gpu


def _checked(index: Index) -> Index:
    return index.take(list(range(min(CHECKED, len(index)))))


def tracer_loader(source: Source, workers: int, device: str, loading: LoadingSettings) -> Entrant:
    """Return one of the package's loaders, whose batches are on ``device``."""
    clip, index = source.clip, source.pictures
    checked = _checked(index)

    def epoch() -> Iterator[Tensor]:
        batches = TrainingBatches(
            index,
            clip,
            batch_size=source.batch,
            steps=source.batches,
            seed=0,
            crop_scale=CROP,
            workers=workers,
            device=device,
            loading=loading,
        )
        return (batch.image for batch in batches)

    def evaluation() -> Tensor:
        settings = replace(loading, workers=workers)
        plan = evaluation_plan(checked, clip.picture_format, len(checked), settings, torch.device(device))
        return next(load(plan))[0]

    return Entrant(epoch, evaluation, device == "cpu" and loading.jpeg == "exact")


class Files(Dataset[Tensor]):
    """A data set whose pictures a DataLoader's workers read and transform."""

    def __init__(self, files: list[Path], transform: Callable[[Path], Tensor]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Tensor:
        return self.transform(self.files[row])


def torch_loader(
    source: Source, read: Callable[..., Tensor], transform: Callable[[bool], Any], processes: int
) -> Entrant:
    """Return torch's DataLoader with this way to read a file, and this transform for training and evaluation."""
    index = source.pictures
    loader = DataLoader(
        Files(list(index.images), partial(read, transform(True))),
        source.batch,
        shuffle=True,
        num_workers=processes,
        persistent_workers=processes > 0,
    )
    checked = Files(list(_checked(index).images), partial(read, transform(False)))
    return Entrant(lambda: loader, lambda: torch.stack([checked[i] for i in range(len(checked))]), True)


def with_pil(transform: Callable[[Image.Image], Tensor], path: Path) -> Tensor:
    """Read and transform a file with PIL."""
    with Image.open(path) as picture:
        return transform(picture.convert("RGB"))


def with_torchvision(transform: Callable[[Tensor], Tensor], path: Path) -> Tensor:
    """Read and transform a file with torchvision."""
    return transform(decode_image(read_file(str(path)), ImageReadMode.RGB))


def open_clip_transform(clip: Clip, training: bool) -> Any:
    """Return open_clip's transform; it also converts the mode, which costs nothing for RGB."""
    wanted = clip.picture_format
    augmentation = {"scale": (CROP, 1.0)} if training else None
    return open_clip.image_transform(wanted.size, training, wanted.mean, wanted.std, aug_cfg=augmentation)


def torchvision_transform(clip: Clip, training: bool) -> Callable[[Tensor], Tensor]:
    """Return the same transform on tensors."""
    wanted = clip.picture_format
    side, cubic = wanted.size, {"interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
    resized: list[Any] = [v2.Resize(side, **cubic), v2.CenterCrop(side)]
    if training:
        resized = [v2.RandomResizedCrop(side, scale=(CROP, 1.0), **cubic)]
    return v2.Compose(
        [*resized, v2.ToDtype(torch.float32, scale=True), v2.Normalize(wanted.mean, wanted.std)]
    )


def dali_loader(source: Source, workers: int, **sampling: Any) -> Entrant:
    """Return a DALI pipeline without the package; without ``sampling`` it only decodes."""
    index = source.pictures

    def epoch() -> Iterator[Tensor]:
        order = shuffled(len(index), source.batch, source.batches, 0)
        return dali(source, order, workers, True, **sampling)

    def evaluation() -> Tensor:
        size = len(_checked(index))
        order = in_order(size, size)
        return next(dali(source._replace(batch=size), order, workers, False, **sampling))

    return Entrant(epoch, evaluation if sampling else None, sampling.get("antialias", False))


def dali(
    source: Source, order: Iterator[np.ndarray], workers: int, training: bool, **sampling: Any
) -> Iterator:
    """Return the batches of a DALI pipeline; without ``sampling`` the largest level of each decoded picture."""
    files, wanted = source.pictures.images, source.clip.picture_format

    @pipeline_def(batch_size=source.batch, num_threads=workers, device_id=None, seed=0)
    def pipeline() -> Any:
        encoded = fn.external_source(
            ([np.fromfile(files[row], np.uint8) for row in rows] for rows in order),
            dtype=types.UINT8,
            ndim=1,
        )
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        if not sampling:
            # It needs every pixel, and pictures of different sizes do not fit into one tensor.
            return fn.reductions.max(image)
        if training:
            image = fn.random_resized_crop(image, size=wanted.size, random_area=[CROP, 1.0], **sampling)
        else:
            sides = fn.peek_image_shape(encoded, dtype=types.FLOAT)[:2]
            # torchvision rounds down too.
            size = dali_math.floor(sides * wanted.size / fn.reductions.min(sides))
            image = fn.resize(image, size=size, **sampling)
        return fn.crop_mirror_normalize(
            image,
            crop=(wanted.size, wanted.size),
            mean=[255 * m for m in wanted.mean],
            std=[255 * s for s in wanted.std],
            output_layout="CHW",
            dtype=types.FLOAT,
        )

    for (batch,) in DALIGenericIterator(pipeline(), ["image"], auto_reset=False):
        yield batch["image"]


# ---------------------------------------------------------------------------------------------------
# Measuring.


def difference(got: Tensor, expected: Tensor, clip: Clip) -> list[float]:
    """Return the mean and largest difference of two normalised batches [n, 3, S, S], in levels of 255."""
    levels = 255 * torch.tensor(clip.picture_format.std)[:, None, None] * (got.cpu() - expected)
    return [float(levels.abs().mean()), float(levels.abs().max())]


def processor_seconds() -> float:
    """Return the time that this process and its worker processes have used of the processor, in seconds."""
    used = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            times = child.cpu_times()
            used += times.user + times.system
    return used


def run_through(epoch: Callable[[], Iterable[Tensor]], count: int, used: list[float] | None = None) -> None:
    """Load every picture of an epoch onto the device that a model would be on; add the processor's time."""
    begun = processor_seconds()
    loaded = sum(len(image.to(DEVICE, non_blocking=True)) for image in epoch())
    assert loaded == count, f"{loaded} pictures instead of {count}"
    if used is not None:
        used.append(processor_seconds() - begun)


def compare(source: Source, workers: int, repeats: int, budget: float) -> list[dict[str, Any]]:
    """Check and time all loaders of one source, and return their rows.

    Raises:
        WrongResult: pixels that must be PIL's differ; ends the benchmark.
    """
    loaders = entrants(source, workers)
    differences = _differences(source, loaders)
    count = source.batch * source.batches
    used: dict[str, list[float]] = {name: [] for name in loaders}
    times = interleaved(
        {name: partial(run_through, loader.epoch, count, used[name]) for name, loader in loaders.items()},
        repeats=repeats,
        budget=budget,
    )
    return [
        {
            "source": source.name,
            "kilobytes": sum(path.stat().st_size for path in source.files) / len(source.files) / 1000,
            "loader": name,
            "workers": 0 if name == ALONE else workers,
            "pictures": count,
            "time": times[name],
            "processor_ms": 1000 * statistics.median(used[name]) / count,
            "difference": differences.get(name),
            "faster": times[PIL].median / times[name].median,
        }
        for name in loaders
    ]


def _differences(source: Source, loaders: dict[str, Entrant]) -> dict[str, list[float]]:
    """Return by loader how its evaluation's pixels differ from PIL's, and check that those that must not don't."""
    reference = loaders[PIL].evaluation()  # type: ignore[misc]
    differences = {}
    for name, loader in loaders.items():
        if loader.evaluation is None or name in (PIL, ALONE):
            continue
        mean, largest = differences[name] = difference(loader.evaluation(), reference, source.clip)
        if loader.same and not (mean <= SAME[0] and largest <= SAME[1]):
            raise WrongResult(
                f"{source.name}: pixels of {name} differ from PIL's by {mean:.2f} of 255 on average and "
                f"{largest:.0f} at most, allowed {SAME[0]} and {SAME[1]}"
            )
    return differences


def measure(
    *, quick: bool = False, workers: int | None = None, repeats: int | None = None, budget: float = 90.0
) -> dict[str, Any]:
    """Time all loaders on generated JPEGs and on the demo's icons.

    Args:
        quick: fewer pictures and fewer turns.
        workers: threads or worker processes of each loader; default: the number of usable cores.
        repeats: turns of each loader; default: 7, quick 3.
        budget: seconds for the turns of one source; at least three turns are taken.
    """
    workers = workers or len(os.sched_getaffinity(0))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sources(Path(folder), quick):
            progress(f"loader: {source.name}")
            rows += compare(source, workers, repeats or (3 if quick else 7), budget)
    return {"rows": rows}


def _per_second(row: dict[str, Any]) -> tuple[float, float, float]:
    """Return the pictures per second: median, 20th and 80th percentile."""
    time = Timing(**row["time"])
    return row["pictures"] / time.median, row["pictures"] / time.high, row["pictures"] / time.low


def report(results: dict[str, Any]) -> str:
    """Return a table for each source, as Markdown."""
    parts = []
    for source in dict.fromkeys(row["source"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["source"] == source]
        lines = [
            [
                row["loader"],
                str(row["workers"]),
                "{:.0f} ({:.0f}–{:.0f})".format(*_per_second(row)),
                f"{row['faster']:.2f}×",
                f"{row['processor_ms']:.2f}" if "processor_ms" in row else "",  # older results lack it
                "{:.2f} ({:.0f})".format(*row["difference"]) if row["difference"] else "",
            ]
            for row in rows
        ]
        header = [
            "loader",
            "workers",
            "pictures/s",
            "PIL's time / its own",
            "processor ms a picture",
            "mean (largest) difference from PIL",
        ]
        parts.append(
            f"{source}, {rows[0]['kilobytes']:.0f} kB each, {rows[0]['pictures']} pictures per turn. Differences "
            f"are in levels of 255, between pixels of the evaluation's transform.\n\n{table(header, lines)}"
        )
    return "\n\n".join(parts)


def _jpeg_row(results: dict[str, Any], loader: str) -> dict[str, Any]:
    """Return the loader's first row, which is that of the JPEGs."""
    return next(row for row in results["rows"] if row["loader"] == loader)


def highlights(results: dict[str, Any]) -> list[Highlight]:
    """Return the row of the JPEGs, compared with PIL."""
    ours, pil = _jpeg_row(results, OURS), _jpeg_row(results, PIL)
    return [
        Highlight(
            f"loading {ours['source']}, same pixels, {ours['workers']} cores",
            f"{_per_second(ours)[0]:.0f} pictures/s",
            f"PIL and DataLoader: {_per_second(pil)[0]:.0f} pictures/s",
            f"{ours['faster']:.1f}×",
        )
    ]


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    """Draw the pictures per second as bars."""
    names = list(dict.fromkeys(row["source"] for row in results["rows"]))
    figure = Figure(figsize=(9, 1 + 2.2 * len(names)), layout="constrained")
    for axes, source in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        rows = [row for row in results["rows"] if row["source"] == source][::-1]
        rates = np.array([_per_second(row) for row in rows])
        colours = [plots.OURS if row["loader"].startswith(OURS) else plots.OTHER for row in rows]
        spread = [rates[:, 0] - rates[:, 1], rates[:, 2] - rates[:, 0]]
        axes.barh([row["loader"] for row in rows], rates[:, 0], xerr=spread, color=colours)
        axes.set_title(source, fontsize="medium")
        plots.bare(axes)
    axes.set_xlabel("pictures per second, on the same cores")
    return {"pictures-per-second": figure}


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Return PIL's time divided by TRACER's."""
    return {row["source"]: row["faster"] for row in results["rows"] if row["loader"] == OURS}


if __name__ == "__main__":
    command_line(measure, report)
