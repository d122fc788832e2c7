"""Runs on spoiled data: the same from folder, table and shards, also after SIGKILL at random steps."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cut_runs import kill
from PIL import Image

from tracer.errors import UserError
from tracer.train.config import Config
from tracer.train.log import read_log
from tracer.train.run import finetune

PICTURES = 300


def jpeg(n: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(n).integers(0, 256, (36 + n % 9, 48, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG", quality=90)
    return file.getvalue()


def png(n: int) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg(n))).save(file, "PNG")
    return file.getvalue()


def silent(content: bytes) -> bytes:
    """Damage that only decoding notices: header and end stay."""
    start = content.index(b"IDAT") + 4
    return content[:start] + bytes(20) + content[start + 20 :]


def bomb(content: bytes) -> bytes:
    """A JPEG whose header promises 60,000×60,000 pixels."""
    frame = content.index(b"\xff\xc0")
    return content[: frame + 5] + b"\xea\x60\xea\x60" + content[frame + 9 :]


# Number of the picture → its bytes: 3 % of them, spoiled in ten ways; the last two are noticed during the run.
SPOILED = {
    7: jpeg(7)[:-400],
    31: jpeg(31)[:-2],
    58: b"",
    90: b"<html>404</html>",
    121: jpeg(121)[:100],
    150: png(150)[:200],
    183: bomb(jpeg(183)),
    214: png(214)[:30],
    249: silent(png(249)),
    280: silent(png(280))[:-12] + png(280)[-12:],
}


def write(root: Path) -> dict[str, Path]:
    """Write the pictures as a folder, a TSV file and shards; return the sources."""
    rows = []
    shards = [tarfile.open(_made(root / f"shards/{n}.tar"), "w") for n in range(3)]  # noqa: SIM115
    for n in range(PICTURES):
        content, label = SPOILED.get(n, jpeg(n)), "abc"[n * 3 // PICTURES]
        _made(root / f"folder/{label}/{n:04}.jpg").write_bytes(content)
        rows.append(f"folder/{label}/{n:04}.jpg\t{label}\n")
        for suffix, data in (("jpg", content), ("cls", label.encode())):
            about = tarfile.TarInfo(f"{n:04}.{suffix}")
            about.size = len(data)
            shards[n * 3 // PICTURES].addfile(about, io.BytesIO(data))
    for shard in shards:
        shard.close()
    (root / "table.tsv").write_text("filepath\tlabel\n" + "".join(rows))
    return {"folder": root / "folder", "table": root / "table.tsv", "shards": root / "shards"}


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture
def spoiled(config, tmp_path) -> Config:
    """32 steps of 16: more than one epoch, so that every picture comes up."""
    return dataclasses.replace(
        config,
        eval_data={},
        steps=32,
        save_every=2,
        max_bad=0.05,
        method="flyp",
        loader="torch",
        crop_scale=0.5,
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    return write(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def kept() -> dict[tuple[str, str], Path]:
    """The unbroken runs that a test has made, which are what others compare with too."""
    return {}


@pytest.fixture
def unbroken(spoiled, sources, kept, tmp_path) -> Callable[[str, str], Path]:
    """Return the folder of the unbroken run on a source with a loader."""

    def run(source: str, loader: str) -> Path:
        if (source, loader) not in kept:
            output = tmp_path / f"unbroken-{source}"
            config = dataclasses.replace(spoiled, train_data=sources[source], output=output, loader=loader)
            kept[source, loader] = finetune(config)
        return kept[source, loader]

    return run


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_every_source_trains_the_same_model(unbroken, loader):
    weights = (unbroken("folder", loader) / "student.safetensors").read_bytes()
    for name in ("folder", "table", "shards"):
        run = unbroken(name, loader)
        assert (run / "student.safetensors").read_bytes() == weights, name
        rows = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
        names = [row["picture"].removesuffix(".jpg")[-4:] for row in rows]
        assert names == ["0249", "0280"] or names == ["0280", "0249"]
        assert all(row["reason"] for row in rows)


@pytest.mark.parametrize("source", ["folder", "table", "shards"])
def test_a_run_that_is_killed_at_random_steps_ends_as_an_unbroken_one(
    spoiled, sources, unbroken, tmp_path, source
):
    whole, config = unbroken(source, "torch"), dataclasses.replace(spoiled, train_data=sources[source])
    for step in sorted(random.Random(source).sample(range(2, 26), 2)):
        kill(config, tmp_path / "settings.yaml", after=step)
    end = finetune(config)
    for name in ("student.safetensors", "skipped.jsonl"):
        assert (end / name).read_bytes() == (whole / name).read_bytes()
    assert [row["loss"] for row in read_log(end)] == [row["loss"] for row in read_log(whole)]


def test_more_spoiled_pictures_than_are_allowed_stop_a_run_with_a_report(spoiled, tmp_path):
    source = write(tmp_path)["table"]
    with pytest.raises(
        UserError, match=r"8 of 300 pictures of 'table' cannot be used: .* --max_bad 0.01 allows"
    ):
        finetune(dataclasses.replace(spoiled, train_data=source, max_bad=0.01))
    config = dataclasses.replace(spoiled, train_data=source, steps=60, max_bad=0.027)
    for n in range(100, 110):  # and more that only decoding notices
        (tmp_path / f"folder/b/{n:04}.jpg").write_bytes(silent(png(n)))
    with pytest.raises(UserError, match=r"of 292 pictures failed during the run, more than --max_bad 0.027"):
        finetune(config)
