"""WebDataset shards: the layouts of open_clip, img2dataset and CLIP_benchmark, and the shards that are refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tracer.data.build import read_index
from tracer.data.config import LoadingSettings
from tracer.errors import UserError


def picture(n: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((12, 16, 3), 20 * (n % 12), np.uint8)).save(file, form)
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes | str], mode: str = "w") -> Path:
    """Write a tar file with these members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return path


@pytest.fixture
def read(tmp_path):
    def run(source, **settings):
        return read_index(Path(source), None, LoadingSettings(cache=tmp_path / "cache", **settings))

    return run


def samples(index) -> list[tuple[str, str | None, list[str]]]:
    """Name in the shard, class and captions of every sample."""
    ids = [index.id(row).rpartition(": ")[2] for row in range(len(index))]
    return list(zip(ids, index.labels, index.captions, strict=True))


def test_pictures_are_read_by_offset_with_their_captions_and_classes(tmp_path, read):
    path = shard(
        tmp_path / "a.tar",
        {
            "x/000.txt": "one\n\n two \n",
            "x/000.png": picture(1),
            "001.json": json.dumps({"caption": "three", "other": ["four", "five"]}),
            "001.webp": picture(2, "WEBP"),
            "002.cls": "7\n",
            "002.jpg": picture(3, "JPEG"),
            "note.txt": "no picture",
        },
    )
    index = read(path)
    assert samples(index) == [
        ("x/000", None, ["one", "two"]),
        ("001", None, ["three"]),
        ("002", "7", ["a photo of a 7"]),
    ]
    assert [index.read(row) for row in range(3)] == [picture(1), picture(2, "WEBP"), picture(3, "JPEG")]
    assert index.about.formats == {"PNG": 1, "WEBP": 1, "JPEG": 1}
    assert samples(read(path, json_caption_key="other", max_bad=0.5))[1][2] == ["four", "five"]


def test_a_caption_field_that_is_named_precedes_the_txt(tmp_path, read):
    """img2dataset writes both; where the field is missing or null, the txt is left."""
    fields = [{"caption": "a", "long": ["b", None, "c"]}, {"caption": "d"}, {"long": None}]
    members = {f"{n}.{suffix}": content for n, field in enumerate(fields) for suffix, content in
               (("png", picture(n)), ("txt", f"text {n}"), ("json", json.dumps(field)))}  # fmt: skip
    path = shard(tmp_path / "a.tar", members)
    assert [texts for *_, texts in samples(read(path))] == [["text 0"], ["text 1"], ["text 2"]]
    assert [texts for *_, texts in samples(read(path, json_caption_key="long"))] == [
        ["b", "c"],
        ["text 1"],
        ["text 2"],
    ]
    assert samples(read(path, json_caption_key="caption"))[1][2] == ["d"]


def test_open_clip_and_img2dataset_name_their_shards(tmp_path, read):
    for n in range(3):
        shard(tmp_path / f"set/0000{n}.tar", {f"{n}.jpg": picture(n, "JPEG"), f"{n}.txt": f"text {n}"})
        (tmp_path / f"set/0000{n}_stats.json").write_text("{}")
        (tmp_path / f"set/0000{n}.parquet").touch()
    folder, braces, union = (
        read(tmp_path / name)
        for name in ("set", "set/{00000..00002}.tar", f"set/00000.tar::{tmp_path}/set/0000{{1,2}}.tar")
    )
    assert folder.name == "set"
    assert (
        samples(folder)
        == samples(braces)
        == samples(union)
        == [(str(n), None, [f"text {n}"]) for n in range(3)]
    )
    assert folder.digest() == braces.digest()
    with pytest.raises(UserError, match=r"names 4 shards, of which 1 cannot be found, first '.*00003.tar'"):
        read(tmp_path / "set/{00000..00003}.tar")


def test_clip_benchmarks_layout_has_names_and_templates(tmp_path, read):
    """ImageNet has two classes of one name: they stay two, and every class has its number."""
    root = tmp_path / "wds_imagenet"
    for n in range(2):
        shard(root / f"test/{n}.tar", {f"s{n}.cls": str(3 * n), f"s{n}.webp": picture(n, "WEBP")})
    (root / "test/nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("missile\ntench\nsunglasses\nmissile\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na bad photo of a {c}.\n")
    (root / "dataset_type.txt").write_text("classification\n")
    index = read(root)
    assert index.classes == ["0", "1", "2", "3"]
    assert list(index.names.values()) == ["missile", "tench", "sunglasses", "missile"]
    assert index.labels == ["0", "3"]
    assert index.label_numbers.tolist() == [0, 3]
    assert index.captions[1] == ["a photo of a missile.", "a bad photo of a missile."]
    assert samples(read(root / "test")) == samples(index)
    shard(root / "train/0.tar", {"a.cls": "1", "a.png": picture(0)})
    (root / "train/nshards.txt").write_text("1")
    with pytest.raises(UserError, match=r"has the parts 'test', 'train': did you mean '.*test'\?"):
        read(root)
    (root / "test/nshards.txt").write_text("3")
    with pytest.raises(UserError, match=r"counts 3 shards, of which 1 cannot be found, first '.*2.tar'"):
        read(root / "test")


def test_an_index_of_wds2idx_is_used(tmp_path, read):
    """DALI's own tool writes it; the names of the members come from there."""
    path = shard(tmp_path / "a.tar", {f"{n}.{s}": c for n in range(3) for s, c in
                                      (("png", picture(n)), ("txt", f"text {n}"))})  # fmt: skip
    expected = samples(read(path))
    tool = Path(sys.executable).with_name("wds2idx")
    subprocess.run([sys.executable, tool, path, path.with_suffix(".idx")], check=True, capture_output=True)
    lines = path.with_suffix(".idx").read_text()
    assert lines.startswith("v1.2 3")
    assert samples(read(path)) == expected
    path.with_suffix(".idx").write_text(
        lines.replace(" 2.png", " renamed.png").replace(" 2.txt", " renamed.txt")
    )
    assert samples(read(path))[2][0] == "renamed"
    shifted = path.with_suffix(".idx").read_text()
    os.utime(path, ns=(time.time_ns() + 10**9,) * 2)  # the shard was written again, and its index was not
    assert samples(read(path)) == expected
    os.utime(path, (0, 0))
    assert samples(read(path))[2][0] == "renamed"
    for broken in ("anything else", shifted.replace(" 512 ", " -512 ")):
        path.with_suffix(".idx").write_text(broken)
        assert samples(read(path)) == expected


GOOD = {f"{n}.{s}": c for n in range(9) for s, c in (("png", picture(n)), ("txt", f"text {n}"))}


def linked(path: Path, kind: bytes) -> None:
    shard(path, GOOD)
    with tarfile.open(path, "a") as tar:
        about = tarfile.TarInfo("link.png")
        about.type, about.linkname = kind, "0.png"
        tar.addfile(about)


def cut(path: Path, size: int) -> None:
    path.write_bytes(shard(path, GOOD).read_bytes()[:size])


BROKEN = {
    "absolute": (lambda p: shard(p, GOOD | {"/etc/a.png": picture(0), "/etc/a.txt": "x"}), "an absolute path"),
    "upwards": (lambda p: shard(p, GOOD | {"../a.png": picture(0)}), "out of the shard with '..'"),
    "symbolic link": (lambda p: linked(p, tarfile.SYMTYPE), "it is a link"),
    "hard link": (lambda p: linked(p, tarfile.LNKTYPE), "it is a link"),
    "cut off": (lambda p: cut(p, 16 * 1024 + 512 + 50), "the shard is cut off"),
    "cut header": (lambda p: cut(p, 17 * 1024 + 100), "the shard is cut off"),
    "cut between": (lambda p: cut(p, 16 * 1024), "the shard is cut off"),
    "empty picture": (lambda p: shard(p, GOOD | {"a.png": b"", "a.txt": "x"}), "it is empty"),
    "html": (lambda p: shard(p, GOOD | {"a.jpg": "<html>", "a.txt": "x"}), "not a picture"),
    "truncated": (lambda p: shard(p, GOOD | {"a.png": picture(0)[:-30], "a.txt": "x"}), "truncated"),
    "empty caption": (lambda p: shard(p, GOOD | {"a.png": picture(0), "a.txt": " \n"}), "neither a label"),
    "no caption": (lambda p: shard(p, GOOD | {"a.png": picture(0)}), "neither a label nor a caption"),
    "other caption": (lambda p: shard(p, GOOD | {"a.png": picture(0), "a.txt": b"\xff"}), "not text in UTF-8"),
    "bad json": (lambda p: shard(p, GOOD | {"a.png": picture(0), "a.json": "{"}), "its json is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_used_of_a_shard_is_counted_and_named(tmp_path, read, capsys, name):
    path = tmp_path / "a.tar"
    BROKEN[name][0](path)
    with pytest.raises(UserError, match=r"\d of \d+ pictures of 'a' cannot be used") as caught:
        read(path)
    assert BROKEN[name][1] in str(caught.value)
    assert "\n" not in str(caught.value)
    index = read(path, max_bad=0.9)
    assert len(index) == (8 if name.startswith("cut") else 9)
    assert BROKEN[name][1] in capsys.readouterr().err


def test_a_name_that_comes_twice_is_named(tmp_path, read):
    path = shard(tmp_path / "a.tar", GOOD)
    with tarfile.open(path, "a") as tar:
        about = tarfile.TarInfo("3.png")
        about.size = len(picture(5))
        tar.addfile(about, io.BytesIO(picture(5)))
    index = read(path, max_bad=0.5)
    assert len(index) == 9
    assert index.read(3) == picture(3)
    assert [fault.reason for fault in index.about.faults] == ["its name comes twice in the shard"]


def test_what_has_a_longer_name_is_not_the_picture(tmp_path, read):
    """WebDataset takes all behind the first dot for the kind: 3.depth.png is no 3.png, whichever comes first."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("3.depth.png", picture(5)), ("3.png", picture(3)), ("3.cls", b"1")):
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    index = read(path)
    assert len(index) == 1
    assert index.read(0) == picture(3)
    assert not index.about.faults


def test_a_shard_without_pictures_is_named(tmp_path, read):
    shard(tmp_path / "set/0.tar", GOOD)
    shard(tmp_path / "set/1.tar", {"a.txt": "a text"})
    index = read(tmp_path / "set", max_bad=0.5)
    assert len(index) == 9
    assert index.about.faults == [(str(tmp_path / "set/1.tar"), "the shard holds no pictures")]


@pytest.mark.parametrize("content", ["gzip", "text"])
def test_a_file_that_is_not_an_uncompressed_tar_is_refused(tmp_path, read, content):
    plain = shard(tmp_path / "plain.tar", GOOD).read_bytes()
    path = tmp_path / ("a.tar.gz" if content == "gzip" else "a.tar")
    path.write_bytes(gzip.compress(plain) if content == "gzip" else b"hello" * 500)
    says = "is compressed: .* unpack it once" if content == "gzip" else "is not a tar file"
    with pytest.raises(UserError, match=says):
        read(path)


def test_a_brace_that_is_not_closed_is_named(tmp_path, read):
    with pytest.raises(UserError, match=r"has a brace that is not closed: write it as name-\{000"):
        read(tmp_path / "a-{00..09.tar")
