"""Pictures with captions: an index of files, and batches of them decoded by a DALI pipeline.

DALI decodes, crops and normalises (on the CPU when there is no GPU), but draws nothing at random: the order of
the pictures is a function of (seed, epoch), their crops and captions of (seed, batch). Every batch is known from
the settings and its number alone, so a run that was cut off goes on at any of them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali.fn
import nvidia.dali.math
import nvidia.dali.types
import torch
from nvidia.dali import pipeline_def
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tracer.errors import UserError
from tracer.files import whole_file
from tracer.model import Clip

# DALI makes these modules' content at import, where a type checker does not see it.
fn: Any = nvidia.dali.fn
dali_math: Any = nvidia.dali.math
types: Any = nvidia.dali.types

FORMATS = {"JPEG", "PNG", "WEBP", "BMP", "TIFF"}  # what DALI decodes of what PIL reads
ATTEMPTS, RATIO = 10, 4 / 3  # of a random crop: draws until one fits, and the largest ratio of its sides
CROPS, CAPTIONS = 1, 2  # set apart the random numbers of a batch, and both from those of an epoch
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass
class Index:
    """N pictures: ``images`` [N] paths, ``labels`` [N] class names, ``captions`` [N] lists of strings."""

    name: str
    images: list[Path]
    labels: list[str]
    captions: list[list[str]]

    @cached_property
    def classes(self) -> list[str]:
        return sorted(set(self.labels))

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """Changes with any name, label, caption, or picture file (by size and time of change)."""
        stats = [path.stat() for path in self.images]
        stamps = [
            (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
            for path, stat in zip(self.images, stats, strict=True)
        ]
        return hashlib.sha256(json.dumps([self.labels, self.captions, stamps]).encode()).hexdigest()

    def take(self, rows: list[int]) -> Index:
        """The index of some of the pictures."""
        return Index(
            self.name,
            [self.images[r] for r in rows],
            [self.labels[r] for r in rows],
            [self.captions[r] for r in rows],
        )


def read_index(source: Path, name: str | None = None) -> Index:
    """Read a CSV (columns image, label and/or captions) or a folder with a sub-folder of pictures per class.

    Paths in a CSV are relative to it. Without captions a caption is made of the label; without labels each
    picture is its own class.

    Raises:
        UserError: missing source, no CSV, wrong columns, missing files, empty data set.
    """
    name = name or source.stem
    if source.is_dir():
        images = sorted(p for p in source.glob("*/**/*") if p.suffix.lower() in PICTURES)
        labels = [p.relative_to(source).parts[0] for p in images]
        captions = [[default_caption(label)] for label in labels]
    elif source.is_file():
        try:
            images, labels, captions = _read_csv(source)
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"'{source}' is no CSV in UTF-8: {error}: save it as one, or give a folder of class folders"
            ) from error
    else:
        raise UserError(f"data '{source}' does not exist: give a CSV file or a folder of class folders")
    if not images:
        raise UserError(
            f"data '{source}' holds no pictures: a CSV needs at least one row below its header, "
            "a folder needs <class>/<picture>"
        )
    missing = [p for p in images if not p.is_file()]
    if missing:
        raise UserError(
            f"'{source}' names {len(missing)} pictures that do not exist, first '{missing[0]}': "
            "paths are relative to the CSV"
        )
    return Index(name, images, labels, captions)


def _read_csv(source: Path) -> tuple[list[Path], list[str], list[list[str]]]:
    with source.open(newline="", encoding="utf-8-sig") as file:  # Excel begins a file with a byte-order mark
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or [])
        if "image" not in columns or not columns & {"label", "captions"}:
            raise UserError(
                f"'{source}' has the columns {', '.join(sorted(columns)) or 'none'}: "
                "it needs 'image' and at least one of 'label' and 'captions'"
            )
        images, labels, captions = [], [], []
        for row in reader:
            texts = [c.strip() for c in (row.get("captions") or "").split("|") if c.strip()]
            label = (row.get("label") or "").strip()
            if not row["image"] or not (texts or label):
                raise UserError(
                    f"'{source}' line {reader.line_num}: needs a picture and a label or a caption"
                )
            images.append(source.parent / row["image"])
            labels.append(label or row["image"])
            captions.append(texts or [default_caption(label)])
    return images, labels, captions


def default_caption(label: str) -> str:
    return f"a photo of a {label.replace('_', ' ').replace('-', ' ')}"


def check_pictures(index: Index, cache: Path, workers: int) -> None:
    """Decode every picture once, so that a damaged one is named now and not in the middle of a run.

    What was found whole is remembered in ``cache``.

    Raises:
        UserError: naming the pictures that cannot be decoded.
    """
    done = cache / f"checked-{index.digest()[:16]}.json"
    if done.is_file():
        return
    with ThreadPoolExecutor(workers) as pool:
        faults = pool.map(_fault, index.images)  # PIL decodes without the GIL
        progress = tqdm(faults, total=len(index), desc=f"checking {index.name}", unit="picture", delay=1)
        bad = [(p, fault) for p, fault in zip(index.images, progress, strict=True) if fault]
    if bad:
        path, fault = bad[0]
        raise UserError(
            f"{len(bad)} of {len(index)} pictures of '{index.name}' cannot be decoded, "
            f"first '{path}' ({fault}): repair them or remove their rows"
        )
    with whole_file(done) as part:
        part.write_text(json.dumps({"pictures": len(index)}))


def _fault(path: Path) -> str | None:
    try:
        with Image.open(path) as picture:
            if picture.format not in FORMATS:
                return f"{picture.format} is not supported, use {', '.join(sorted(FORMATS))}"
            picture.load()
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more for damaged files
        return str(error) or type(error).__name__
    return None


@dataclass
class Batch:
    """``image`` [n, 3, S, S] float32, ``text`` [n, context], ``label`` [n], ``index`` [n], all int64."""

    image: Tensor
    text: Tensor
    label: Tensor
    index: Tensor


def shuffled(size: int, batch_size: int, steps: int, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """Batches ``first``, … ``steps`` − 1 of indices; every epoch is a permutation known from (seed, epoch)."""
    epoch, done = divmod(first * batch_size, size)
    order = _permutation(size, seed, epoch)[done:]
    for _ in range(first, steps):
        while len(order) < batch_size:
            epoch += 1
            order = np.concatenate([order, _permutation(size, seed, epoch)])
        yield order[:batch_size]
        order = order[batch_size:]


def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def in_order(size: int, batch_size: int) -> Iterator[np.ndarray]:
    """Every index once; the last batch may be short."""
    for start in range(0, size, batch_size):
        yield np.arange(start, min(start + batch_size, size))


class Crops(NamedTuple):
    """What the random crops of a batch of n pictures are made of, float32.

    ``sides`` [n, 2, ATTEMPTS]: height and width, in sides of a square as large as the picture.
    ``place`` [n, 2]: where the crop lies between the picture's edges, from 0 to 1, downwards and to the right.
    """

    sides: np.ndarray
    place: np.ndarray


def random_crops(batch_size: int, seed: int, batch: int, smallest: float) -> Crops:
    """Areas uniform in [``smallest``, 1] of the picture's, log(width / height) uniform in ±log RATIO."""
    draw = np.random.default_rng((seed, batch, CROPS))
    area = draw.uniform(smallest, 1, (batch_size, ATTEMPTS))
    ratio = np.exp(draw.uniform(-math.log(RATIO), math.log(RATIO), (batch_size, ATTEMPTS)))
    sides = np.sqrt(np.stack([area / ratio, area * ratio], 1))
    return Crops(sides.astype(np.float32), draw.random((batch_size, 2), np.float32))


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


class TrainingBatches:
    """Batches ``first``, … ``steps`` − 1 of a run: pictures, a caption of each drawn at random, integer labels.

    Pictures are random crops of at least ``crop_scale`` of their area. What comes before ``first`` is not read.
    """

    def __init__(
        self,
        index: Index,
        clip: Clip,
        *,
        batch_size: int,
        steps: int,
        seed: int,
        crop_scale: float,
        first: int = 0,
        workers: int = 2,
        device: torch.device | str = "cpu",
    ):
        if len(index) < batch_size:
            raise UserError(
                f"'{index.name}' holds {len(index)} pictures, fewer than one batch of {batch_size}: "
                "lower --batch_size or add pictures"
            )
        self.numbers, self.seed, self.device = range(first, steps), seed, torch.device(device)
        order = shuffled(len(index), batch_size, steps, seed, first)
        crops = (random_crops(batch_size, seed, batch, crop_scale) for batch in self.numbers)
        # With nothing left to read there is no pipeline: it would ask for a batch at once.
        self.pictures: Iterable[tuple[Tensor, Tensor]] = (
            Pictures(index, clip, order, batch_size, crops=crops, workers=workers, device=device)
            if self.numbers
            else ()
        )
        number = {name: i for i, name in enumerate(index.classes)}
        self.labels = torch.tensor([number[label] for label in index.labels])
        self.first = torch.tensor(np.cumsum([0] + [len(c) for c in index.captions]))
        self.tokens = clip.tokenizer([c for captions in index.captions for c in captions])

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Batch]:
        for number, (image, index) in zip(self.numbers, self.pictures, strict=True):
            start, count = self.first[index], self.first[index + 1] - self.first[index]
            chance = np.random.default_rng((self.seed, number, CAPTIONS)).random(len(index))
            row = start + (torch.from_numpy(chance) * count).long()
            text, label = self.tokens[row], self.labels[index]
            yield Batch(image, text.to(self.device), label.to(self.device), index)
