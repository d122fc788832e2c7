"""What all tests share: poisoned memory, a tiny open_clip model and a data set of drawn pictures."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import poison
import torch

if not torch.cuda.is_available():  # before anything imports triton: its own library decides at import too
    os.environ.setdefault("TRITON_INTERPRET", "1")

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SHAPES = ("circle", "square", "cross", "bar")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch) -> None:
    """Fill what ``torch.empty`` and its relatives return to this repository's code with poison.

    Fresh memory is usually zero, so a kernel that reads a lane that nobody wrote would pass its tests by luck.
    """
    poison.install(monkeypatch)


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Keep what the tests cache out of the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> Path:
    """An open_clip model config of one layer per tower."""
    path = tmp_path_factory.mktemp("model") / "tiny-clip.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="session")
def drawings(tmp_path_factory) -> Path:
    """48 drawn pictures of four shapes as ``train.csv`` (32) and ``test.csv`` (16), two captions each."""
    from PIL import Image, ImageDraw

    root = tmp_path_factory.mktemp("drawings")
    rows = []
    for n, name in enumerate(SHAPES * 12):
        picture = Image.new("RGB", (40, 40), (255, 255 - 3 * n, 255))
        draw, d = ImageDraw.Draw(picture), 4 + n % 7
        if name == "circle":
            draw.ellipse((d, d, 40 - d, 40 - d), fill=(200, 30, n))
        elif name == "square":
            draw.rectangle((d, d, 40 - d, 40 - d), fill=(30, 200, n))
        elif name == "cross":
            draw.line((d, d, 40 - d, 40 - d), fill=(0, 0, n), width=4)
            draw.line((d, 40 - d, 40 - d, d), fill=(0, 0, n), width=4)
        else:
            draw.rectangle((d, 16, 40 - d, 24), fill=(30, n, 200))
        file = f"{name}-{n:02d}.png"
        picture.save(root / file)
        rows.append({"image": file, "label": name, "captions": f"a {name}|the drawing of a {name}"})
    for split, part in (("train", rows[:32]), ("test", rows[32:])):
        with (root / f"{split}.csv").open("w", newline="") as out:
            writer = csv.DictWriter(out, ["image", "label", "captions"])
            writer.writeheader()
            writer.writerows(part)
    return root
