"""The picture files that the benchmarks load: drawings with the spectrum of photographs, and the demo's icons."""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from PIL import Image

from tracer.data.build import index_samples
from tracer.data.config import LoadingSettings
from tracer.data.index import Index
from tracer.data.sample import Sample
from tracer.demo.config import ICONS
from tracer.models.clip import Clip
from tracer.models.picture_format import PictureFormat

CROP = 0.9  # smallest share of the area that a random crop keeps


class Source(NamedTuple):
    """Picture files, the side in pixels that they are resized to, and how many batches make an epoch."""

    name: str
    files: list[Path]
    side: int
    batch: int
    batches: int

    @property
    def pictures(self) -> Index:
        """The pictures of an epoch, which repeat the files in turn."""
        once = indexed(self.name, tuple(self.files))
        return once.take(np.arange(self.batch * self.batches) % len(self.files))

    @property
    def clip(self) -> Clip:
        """The picture format of a model with this input size; captions are not part of this benchmark."""
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        wanted = PictureFormat(self.side, mean, std)
        return Clip(self.name, None, lambda captions: torch.zeros(len(captions), 1), wanted)


@lru_cache
def indexed(name: str, files: tuple[Path, ...]) -> Index:
    """Return the index of files, looked at once, as that of a data set is kept."""
    samples = (Sample(str(file), "picture", ("a picture",)) for file in files)
    return index_samples(name, samples, LoadingSettings())


def sources(folder: Path, quick: bool) -> list[Source]:
    """Write the files of all sources into ``folder``: JPEGs of three kinds, and small icons."""
    kind, files = icons(folder, 64 if quick else 512)
    count = 48 if quick else 192
    imagenet = photographs(folder / "imagenet", count)
    small = photographs(folder / "small", count, quality=80)
    large = photographs(folder / "large", 4 if quick else 16, (2000, 1500), 90)
    return [
        Source("500×375 JPEG → 224×224", imagenet, 224, 64, 4 if quick else 16),
        Source("500×375 JPEG, quality 80 → 224×224", small, 224, 64, 4 if quick else 16),
        Source("2000×1500 JPEG → 224×224", large, 224, 16, 2 if quick else 8),
        Source(f"64×64 PNG ({kind}) → 40×40", files, 40, 128, 16 if quick else 32),
    ]


def photographs(
    folder: Path, count: int, size: tuple[int, int] = (500, 375), quality: int = 92
) -> list[Path]:
    """Write ``count`` JPEGs, the same on every machine; the defaults have ImageNet's mean size, 108 kB."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        drawing(i, *size).save(path, quality=quality)
    return paths


def icons(folder: Path, count: int) -> tuple[str, list[Path]]:
    """Return what they are, and the demo's icons if they have been prepared, else drawings of the same format."""
    listed = ICONS / "train.csv"
    if listed.is_file():
        with listed.open(newline="") as file:
            return "demo's icons", [ICONS / row["image"] for row in csv.DictReader(file)][:count]
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        drawing(i, 64, 64).save(path)
    return "drawings", paths


def drawing(seed: int, width: int, height: int) -> Image.Image:
    """Draw a picture with a photograph's spectrum: amplitudes fall as 1/frequency, and colours vary together."""
    rng = np.random.default_rng(seed)
    y, x = np.fft.fftfreq(height) * height, np.fft.rfftfreq(width) * width
    frequency = np.maximum(np.hypot(y[:, None], x), 1)

    def texture() -> np.ndarray:
        waves = rng.standard_normal((2, *frequency.shape))
        levels = np.fft.irfft2((waves[0] + 1j * waves[1]) / frequency, s=(height, width))
        return levels / levels.std()

    grey = 36 * texture()
    levels = np.stack([128 + grey + 6 * texture() for _ in range(3)], 2)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))
