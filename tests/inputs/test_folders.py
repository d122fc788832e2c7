"""Folders of class folders as they lie on real disks: what is taken, left out, and asked about."""

from __future__ import annotations

import pytest
from PIL import Image

from tracer.data.build import read_index


@pytest.fixture
def folder(tmp_path):
    """Write pictures and other files below ``data``; a picture's format follows from its suffix."""
    formats = {
        ".jfif": "JPEG",
        ".jpe": "JPEG",
        ".mpo": "MPO",
        ".gif": "GIF",
        ".png": "PNG",
        ".jp2": "JPEG2000",
    }

    def write(*names: str):
        for n, name in enumerate(names):
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind := formats.get(path.suffix.lower()):
                Image.new("RGB", (8, 8), (40 * n, 80, 0)).save(path, format=kind)
            else:
                path.write_bytes(b"\0\5\x16\7")
        return tmp_path / "data"

    return write


HIDDEN = (
    ".ipynb_checkpoints/a.png",
    "fox/.ipynb_checkpoints/a-checkpoint.png",
    "__MACOSX/fox/._a.jpg",
    "fox/._a.jpg",
    "fox/.DS_Store",
    "fox/Thumbs.db",
    "owl/@eaDir/a.png",
)


def test_hidden_names_are_no_data_and_no_class(folder, evaluate):
    data = folder("fox/a.png", "owl/b.png", *HIDDEN)
    assert read_index(data).classes == ["fox", "owl"]
    assert len(read_index(data)) == 2
    code, stderr = evaluate(data)
    assert code == 0
    assert "left out" not in stderr


def test_what_is_left_out_is_counted_once_with_its_reason(folder, evaluate):
    names = (
        "fox/a.png",
        "owl/b.png",
        "fox/a.psd",
        "fox/b.psd",
        "owl/notes.txt",
        "owl/raw",
        "bat/a.heic",
        "c.png",
    )
    code, stderr = evaluate(folder(*names))
    assert code == 0
    (line,) = (line for line in stderr.splitlines() if "left out" in line)
    assert "left out 6 files" in line
    for reason in ("2 .psd", "1 .txt", "1 without a suffix", "1 .heic", "1 outside a class folder"):
        assert reason in line
    assert "1 class without a picture that can be read ('bat')" in line


def test_every_suffix_that_both_decoders_read_is_taken(folder, evaluate):
    data = folder("a/1.jfif", "b/1.JPE", "c/1.mpo", "d/1.jp2")
    assert read_index(data).classes == ["a", "b", "c", "d"]
    assert evaluate(data)[0] == 0


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (("train/fox/a.png", "train/owl/b.png", "val/fox/c.png"), "data/train"),
        (("Train/fox/a.png", "Test/fox/c.png", "docs/a/b.png"), "data/Train"),
        (("val/fox/a.png", "val/owl/b.png"), "data/val"),
        (("train/a.png", "test/b.png"), "data/train"),
        (("images/fox/a.png", "images/owl/b.png"), "data/images"),
    ],
)
def test_a_folder_one_level_too_high_is_asked_about(folder, refusal, names, meant):
    line = refusal(folder(*names))
    assert "did you mean" in line
    assert f"{meant}'" in line


def test_a_class_may_be_called_like_a_split(folder):
    assert read_index(folder("train/a.png", "bus/b.png", "plane/c.png")).classes == ["bus", "plane", "train"]


def test_a_class_folder_may_be_a_link(folder, tmp_path):
    data = folder("fox/a.png", "../elsewhere/b.png")
    (data / "owl").symlink_to(tmp_path / "elsewhere")
    assert read_index(data).classes == ["fox", "owl"]
