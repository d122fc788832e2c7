"""Pictures per second: the package's loader against PIL and torch's DataLoader, with the same pixels.

    python -m benchmarks.loader                         JPEGs to 224×224, the demo's icons to 40×40
    python -m benchmarks.loader --quick
    python -m benchmarks.loader --workers 1 --repeats 9

Every turn is an epoch from the files to normalised float tensors in batches: random crops of at least 0.9 of the
area, resized; order and crops anew each time. Pipelines are built and drained within the turn, so that none
works ahead on another's time; only torch's worker processes are kept alive. All get the same cores: threads in
DALI and in the package, processes in the DataLoader. Before any speed is printed, the pixels of the evaluation's
transform (no randomness) are compared with those of PIL, in levels of 255.
"""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali
import nvidia.dali.fn
import nvidia.dali.math
import nvidia.dali.types
import open_clip
import torch
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from benchmarks._measure import Timing, interleaved, table
from benchmarks._part import Highlight, command_line, progress
from tracer.data.batches import TrainingBatches
from tracer.data.dali import Pictures
from tracer.data.index import Index
from tracer.data.order import in_order, shuffled
from tracer.demo.config import ICONS
from tracer.models.clip import Clip
from tracer.models.picture_format import PictureFormat

fn: Any = nvidia.dali.fn
types: Any = nvidia.dali.types
dali_math: Any = nvidia.dali.math
pipeline_def: Any = nvidia.dali.pipeline_def

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CROP = 0.9  # smallest share of the area that a crop keeps
SAME = (0.5, 16)  # largest mean and single difference of pixels that are called the same, of 255 levels
CHECKED = 32  # pictures whose pixels are compared

OURS, PIL = "tracer", "PIL, DataLoader"
ALONE, TORCHVISION, CUBIC = "PIL, DataLoader in the main process", "torchvision, DataLoader", "DALI alone"
LINEAR, DECODED, ON_GPU = (
    "DALI, linear without antialias",
    "DALI, decoding only",
    "tracer, decoding on the GPU",
)


class Source(NamedTuple):
    """Files, what becomes of them, and how many of them make an epoch."""

    name: str
    files: list[Path]
    side: int
    batch: int
    batches: int

    @property
    def pictures(self) -> Index:
        """As many pictures as an epoch has, files in turn."""
        count = self.batch * self.batches
        images = [self.files[i % len(self.files)] for i in range(count)]
        return Index(self.name, images, ["picture"] * count, [["a picture"]] * count)

    @property
    def clip(self) -> Clip:
        """The picture format of a model with this input size; captions are no part of this benchmark."""
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        wanted = PictureFormat(self.side, mean, std)
        return Clip(self.name, None, lambda captions: torch.zeros(len(captions), 1), wanted)


def drawing(seed: int, width: int, height: int) -> Image.Image:
    """A picture with the spectrum of a photograph: amplitudes fall as 1/frequency, colours go together."""
    rng = np.random.default_rng(seed)
    y, x = np.fft.fftfreq(height) * height, np.fft.rfftfreq(width) * width
    frequency = np.maximum(np.hypot(y[:, None], x), 1)

    def texture() -> np.ndarray:
        waves = rng.standard_normal((2, *frequency.shape))
        found = np.fft.irfft2((waves[0] + 1j * waves[1]) / frequency, s=(height, width))
        return found / found.std()

    grey = 36 * texture()
    levels = np.stack([128 + grey + 6 * texture() for _ in range(3)], 2)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def photographs(folder: Path, count: int) -> list[Path]:
    """``count`` JPEGs of 500×375 pixels, as ImageNet's are on average, the same on every machine."""
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        drawing(i, 500, 375).save(path, quality=80)
    return paths


def icons(folder: Path, count: int) -> tuple[str, list[Path]]:
    """The demo's icons where they have been prepared, else drawings in their format; and what they are."""
    listed = ICONS / "train.csv"
    if listed.is_file():
        with listed.open(newline="") as file:
            return "demo's icons", [ICONS / row["image"] for row in csv.DictReader(file)][:count]
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        drawing(i, 64, 64).save(path)
    return "drawings", paths


def sources(folder: Path, quick: bool) -> list[Source]:
    kind, files = icons(folder, 64 if quick else 512)
    return [
        Source(
            "500×375 JPEG → 224×224", photographs(folder, 48 if quick else 192), 224, 64, 8 if quick else 16
        ),
        Source(f"64×64 PNG ({kind}) → 40×40", files, 40, 128, 8 if quick else 32),
    ]


class Files(Dataset[Tensor]):
    """What a DataLoader's workers read and transform."""

    def __init__(self, files: list[Path], transform: Callable[[Path], Tensor]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Tensor:
        return self.transform(self.files[row])


def with_pil(transform: Callable[[Image.Image], Tensor], path: Path) -> Tensor:
    with Image.open(path) as picture:
        return transform(picture.convert("RGB"))


def with_torchvision(transform: Callable[[Tensor], Tensor], path: Path) -> Tensor:
    return transform(decode_image(read_file(str(path)), ImageReadMode.RGB))


def torchvision_transform(clip: Clip, training: bool) -> Callable[[Tensor], Tensor]:
    """open_clip's own transforms on tensors."""
    wanted = clip.picture_format
    side, cubic = wanted.size, {"interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
    resized: list[Any] = [v2.Resize(side, **cubic), v2.CenterCrop(side)]
    if training:
        resized = [v2.RandomResizedCrop(side, scale=(CROP, 1.0), **cubic)]
    return v2.Compose(
        [*resized, v2.ToDtype(torch.float32, scale=True), v2.Normalize(wanted.mean, wanted.std)]
    )


def dali(
    source: Source, order: Iterator[np.ndarray], workers: int, training: bool, **sampling: Any
) -> Iterator:
    """Batches of a pipeline that is DALI's alone; without ``sampling`` the decoded pictures."""
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
            return fn.reductions.max(image)  # every pixel is there; pictures of many sizes make no tensor
        if training:
            image = fn.random_resized_crop(image, size=wanted.size, random_area=[CROP, 1.0], **sampling)
        else:
            sides = fn.peek_image_shape(encoded, dtype=types.FLOAT)[:2]
            size = dali_math.floor(sides * wanted.size / fn.reductions.min(sides))  # as torchvision rounds
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


class Entrant(NamedTuple):
    """A way to load: an epoch of training, and the first pictures as the evaluation sees them."""

    epoch: Callable[[], Iterable[Tensor]]
    evaluation: Callable[[], Tensor] | None
    same: bool  # whether the pixels must be PIL's


def entrants(source: Source, workers: int) -> dict[str, Entrant]:
    """All ways to load, by name."""
    clip, index = source.clip, source.pictures
    wanted = clip.picture_format
    first = index.take(list(range(min(CHECKED, len(index)))))

    def torch_loader(
        read: Callable[..., Tensor], transform: Callable[[bool], Any], processes: int
    ) -> Entrant:
        loader = DataLoader(
            Files(index.images, partial(read, transform(True))),
            source.batch,
            shuffle=True,
            num_workers=processes,
            persistent_workers=processes > 0,
        )
        checked = Files(first.images, partial(read, transform(False)))
        return Entrant(lambda: loader, lambda: torch.stack([checked[i] for i in range(len(checked))]), True)

    def ours(device: str) -> Entrant:
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
            )
            return (batch.image for batch in batches)

        def evaluation() -> Tensor:
            size = len(first)
            pictures = Pictures(first, wanted, in_order(size, size), size, workers=workers, device=device)
            return next(iter(pictures))[0]

        return Entrant(epoch, evaluation, device == "cpu")

    def dali_alone(**sampling: Any) -> Entrant:
        def epoch() -> Iterator[Tensor]:
            order = shuffled(len(index), source.batch, source.batches, 0)
            return dali(source, order, workers, True, **sampling)

        def evaluation() -> Tensor:
            checked = source._replace(batch=len(first))
            return next(dali(checked, in_order(len(first), len(first)), workers, False, **sampling))

        return Entrant(epoch, evaluation if sampling else None, sampling.get("antialias", False))

    def open_clip_transform(training: bool) -> Any:
        """Both also mend the mode, which is no cost for RGB."""
        augmentation = {"scale": (CROP, 1.0)}
        return open_clip.image_transform(
            source.side, training, wanted.mean, wanted.std, aug_cfg=augmentation if training else None
        )

    cubic = {"interp_type": types.INTERP_CUBIC, "antialias": True}
    found = {
        PIL: torch_loader(with_pil, open_clip_transform, workers),
        ALONE: torch_loader(with_pil, open_clip_transform, 0),
        TORCHVISION: torch_loader(with_torchvision, partial(torchvision_transform, clip), workers),
        OURS: ours("cpu"),
        CUBIC: dali_alone(**cubic),
        LINEAR: dali_alone(interp_type=types.INTERP_LINEAR, antialias=False),
        DECODED: dali_alone(),
    }
    return found | ({ON_GPU: ours("cuda")} if GPU else {})


def difference(got: Tensor, expected: Tensor, clip: Clip) -> list[float]:
    """Mean and largest difference of two normalised batches [n, 3, S, S], in levels of 255."""
    levels = 255 * torch.tensor(clip.picture_format.std)[:, None, None] * (got.cpu() - expected)
    return [float(levels.abs().mean()), float(levels.abs().max())]


def run_through(epoch: Callable[[], Iterable[Tensor]], count: int) -> None:
    """Every picture of an epoch, on the device that a model would be on."""
    got = sum(len(image.to(DEVICE, non_blocking=True)) for image in epoch())
    assert got == count, f"{got} pictures of {count}"


def compare(source: Source, workers: int, repeats: int, budget: float) -> list[dict[str, Any]]:
    """Rows of one source. SystemExit where pixels that must be the same are not."""
    ways = entrants(source, workers)
    reference = ways[PIL].evaluation()  # type: ignore[misc]
    apart = {}
    for name, way in ways.items():
        if way.evaluation is None or name in (PIL, ALONE):
            continue
        apart[name] = difference(way.evaluation(), reference, source.clip)
        if way.same and not all(d <= limit for d, limit in zip(apart[name], SAME, strict=True)):
            raise SystemExit(
                f"no speed without a right result: {source.name}: pixels of {name} differ from PIL's by "
                f"{apart[name][0]:.2f} of 255 in the mean and {apart[name][1]:.0f} at most, allowed {SAME}"
            )
    count = source.batch * source.batches
    times = interleaved(
        {name: partial(run_through, way.epoch, count) for name, way in ways.items()},
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
            "difference": apart.get(name),
            "faster": times[PIL].median / times[name].median,
        }
        for name in ways
    ]


def measure(
    *, quick: bool = False, workers: int | None = None, repeats: int | None = None, budget: float = 90.0
) -> dict[str, Any]:
    """Time all loaders on generated JPEGs and on the demo's icons.

    Args:
        quick: fewer pictures and turns.
        workers: threads, or worker processes, of each loader; default: the usable cores.
        repeats: turns of each loader; default: 7, quick 3.
        budget: seconds for the turns of one kind of picture, at most; three turns are always taken.
    """
    workers = workers or len(os.sched_getaffinity(0))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sources(Path(folder), quick):
            progress(f"loader: {source.name}")
            rows += compare(source, workers, repeats or (3 if quick else 7), budget)
    return {"rows": rows}


def _per_second(row: dict[str, Any]) -> tuple[float, float, float]:
    """Pictures per second: median, 20th and 80th percentile."""
    time = Timing(**row["time"])
    return row["pictures"] / time.median, row["pictures"] / time.high, row["pictures"] / time.low


def report(results: dict[str, Any]) -> str:
    """The table of each kind of picture."""
    parts = []
    for source in dict.fromkeys(row["source"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["source"] == source]
        lines = [
            [
                row["loader"],
                str(row["workers"]),
                "{:.0f} ({:.0f}–{:.0f})".format(*_per_second(row)),
                f"{row['faster']:.2f}×",
                "{:.2f} ({:.0f})".format(*row["difference"]) if row["difference"] else "",
            ]
            for row in rows
        ]
        head = ["loader", "workers", "pictures/s", "PIL's time / its", "mean (largest) difference from PIL"]
        parts.append(
            f"{source}, {rows[0]['kilobytes']:.0f} kB each, {rows[0]['pictures']} pictures a turn; "
            "differences are those of the evaluation's pixels, of 255\n\n" + table(head, lines)
        )
    return "\n\n".join(parts)


def _row(results: dict[str, Any], loader: str) -> dict[str, Any]:
    """Of the JPEGs."""
    return next(row for row in results["rows"] if row["loader"] == loader)


def highlights(results: dict[str, Any]) -> list[Highlight]:
    """The package's loader against PIL's on JPEGs."""
    ours, theirs = _row(results, OURS), _row(results, PIL)
    return [
        Highlight(
            f"loading {ours['source']}, same pixels, {ours['workers']} cores",
            f"{_per_second(ours)[0]:.0f} pictures/s",
            f"PIL and DataLoader: {_per_second(theirs)[0]:.0f} pictures/s",
            f"{ours['faster']:.1f}×",
        )
    ]


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """Bars of pictures per second."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["source"] for row in results["rows"]))
    figure = Figure(figsize=(9, 1 + 2.2 * len(names)), layout="constrained")
    for axes, source in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        rows = [row for row in results["rows"] if row["source"] == source][::-1]
        rates = np.array([_per_second(row) for row in rows])
        colours = ["tab:orange" if row["loader"].startswith(OURS) else "tab:grey" for row in rows]
        spread = [rates[:, 0] - rates[:, 1], rates[:, 2] - rates[:, 0]]
        axes.barh([row["loader"] for row in rows], rates[:, 0], xerr=spread, color=colours)
        axes.set_title(source, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("pictures per second, on the same cores")
    return {"pictures-per-second": figure}


def exact(results: dict[str, Any]) -> dict[str, float]:
    """Nothing: decoders differ between machines."""
    return {}


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """PIL's time divided by ours."""
    return {row["source"]: row["faster"] for row in results["rows"] if row["loader"] == OURS}


if __name__ == "__main__":
    command_line(measure, report)
