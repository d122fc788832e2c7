"""Pictures with captions: an index of files, and batches of them decoded by a DALI pipeline.

DALI decodes, crops and normalises (on the CPU when there is no GPU); the order of the samples and the choice
of captions are functions of (seed, epoch), so every batch is known from the settings and the step alone.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali.fn
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
types: Any = nvidia.dali.types

FORMATS = {"JPEG", "PNG", "WEBP", "BMP", "TIFF"}  # what DALI decodes of what PIL reads
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


def shuffled(size: int, batch_size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """``steps`` batches of indices; every epoch is a permutation known from (seed, epoch)."""
    epoch, order = 0, np.empty(0, np.int64)
    for _ in range(steps):
        while len(order) < batch_size:
            order = np.concatenate([order, np.random.default_rng((seed, epoch)).permutation(size)])
            epoch += 1
        yield order[:batch_size]
        order = order[batch_size:]


def in_order(size: int, batch_size: int) -> Iterator[np.ndarray]:
    """Every index once; the last batch may be short."""
    for start in range(0, size, batch_size):
        yield np.arange(start, min(start + batch_size, size))


class Pictures:
    """Decoded pictures in the order of ``batches``: yields ``(image, index)`` tensors on ``device``.

    Training takes random crops of at least ``crop_scale`` of the area; evaluation (``crop_scale=None``)
    resizes the shorter side and crops the centre, as open_clip's own transforms do.
    """

    def __init__(
        self,
        index: Index,
        clip: Clip,
        batches: Iterator[np.ndarray],
        batch_size: int,
        *,
        crop_scale: float | None = None,
        seed: int = 0,
        workers: int = 2,
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)
        gpu: Any = self.device.index or 0 if self.device.type == "cuda" else None  # None: no CUDA at all

        def read() -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
            for rows in batches:
                files = [np.fromfile(index.images[i], np.uint8) for i in rows]
                yield files, list(rows[:, None])

        @pipeline_def(batch_size=batch_size, num_threads=workers, device_id=gpu, seed=seed)
        def pipeline() -> tuple[Any, Any]:
            encoded, rows = fn.external_source(
                read, num_outputs=2, dtype=[types.UINT8, types.INT64], ndim=[1, 1]
            )
            decoder = "cpu" if gpu is None else "mixed"
            image = fn.decoders.image(encoded, device=decoder, output_type=types.RGB)
            kind = types.INTERP_CUBIC if clip.interpolation == "bicubic" else types.INTERP_LINEAR
            sampling = {"interp_type": kind, "antialias": True}
            side = clip.image_size
            if crop_scale is not None:
                image = fn.random_resized_crop(image, size=side, random_area=[crop_scale, 1.0], **sampling)
            elif clip.squash:
                image = fn.resize(image, size=[side, side], **sampling)
            else:
                image = fn.resize(image, resize_shorter=side, **sampling)
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
    """``steps`` batches of pictures, one caption of each drawn at random, and integer labels."""

    def __init__(
        self,
        index: Index,
        clip: Clip,
        *,
        batch_size: int,
        steps: int,
        seed: int,
        crop_scale: float,
        workers: int = 2,
        device: torch.device | str = "cpu",
    ):
        if len(index) < batch_size:
            raise UserError(
                f"'{index.name}' holds {len(index)} pictures, fewer than one batch of {batch_size}: "
                "lower --batch_size or add pictures"
            )
        self.steps, self.seed, self.device = steps, seed, torch.device(device)
        order = shuffled(len(index), batch_size, steps, seed)
        self.pictures = Pictures(
            index, clip, order, batch_size, crop_scale=crop_scale, seed=seed, workers=workers, device=device
        )
        number = {name: i for i, name in enumerate(index.classes)}
        self.labels = torch.tensor([number[label] for label in index.labels])
        self.first = torch.tensor(np.cumsum([0] + [len(c) for c in index.captions]))
        self.tokens = clip.tokenizer([c for captions in index.captions for c in captions])

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        choose = torch.Generator().manual_seed(self.seed)
        for image, index in self.pictures:
            start, count = self.first[index], self.first[index + 1] - self.first[index]
            row = start + (torch.rand(len(index), generator=choose) * count).long()
            text, label = self.tokens[row], self.labels[index]
            yield Batch(image, text.to(self.device), label.to(self.device), index)
