"""The index, whatever it was read from, and that reading it needs no heavy library."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tracer.data.build import read_index
from tracer.errors import UserError


def test_a_csv_and_a_folder_give_the_same_index(drawings, tmp_path):
    index = read_index(drawings / "train.csv")
    assert len(index) == 32
    assert index.classes == ["bar", "circle", "cross", "square"]
    assert index.captions[0] == ["a circle", "the drawing of a circle"]
    for image, label in zip(index.images, index.labels, strict=True):
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / image.name).write_bytes(image.read_bytes())
    folder = read_index(tmp_path)
    assert sorted(zip(folder.labels, [p.name for p in folder.images], strict=True)) == sorted(
        zip(index.labels, [p.name for p in index.images], strict=True)
    )
    assert folder.captions[0] == ["a photo of a bar"]


def test_the_name_is_that_of_the_source_unless_given(drawings):
    assert read_index(drawings / "test.csv").name == "test"
    assert read_index(drawings / "test.csv", "held out").name == "held out"


def test_the_index_of_some_pictures(drawings):
    index = read_index(drawings / "train.csv")
    part = index.take([5, 2])
    assert part.images == [index.images[5], index.images[2]]
    assert part.labels == [index.labels[5], index.labels[2]]
    assert part.captions == [index.captions[5], index.captions[2]]
    assert part.name == index.name


def test_the_digest_changes_with_labels_captions_and_files(write_csv, drawings, tmp_path):
    (tmp_path / "a.png").write_bytes(next(drawings.glob("*.png")).read_bytes())
    header, row = ["image", "label", "captions"], ["a.png", "x", "one|two"]
    first = read_index(write_csv("a.csv", header, [row])).digest()
    assert read_index(write_csv("b.csv", header, [row])).digest() == first  # not with the name of the CSV
    assert read_index(write_csv("a.csv", header, [["a.png", "y", "one|two"]])).digest() != first
    assert read_index(write_csv("a.csv", header, [["a.png", "x", "one"]])).digest() != first
    os.utime(tmp_path / "a.png", ns=(0, 0))
    assert read_index(write_csv("a.csv", header, [row])).digest() != first


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing.csv' does not exist: give a folder of class folders"):
        read_index(tmp_path / "nothing.csv")


def test_a_source_without_pictures_is_named(write_csv, tmp_path):
    with pytest.raises(UserError, match=r"bad.csv' holds no pictures: a table needs at least one row"):
        read_index(write_csv("bad.csv", ["image", "label"], []))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder' holds no pictures: .* a folder needs <class>/<picture>"):
        read_index(tmp_path / "folder")


def test_missing_pictures_are_counted_and_the_first_is_named(write_csv):
    source = write_csv("bad.csv", ["image", "label"], [["nowhere.png", "x"], ["gone.png", "x"]])
    with pytest.raises(
        UserError,
        match=r"2 of 2 pictures of 'bad' cannot be used: 2 \(it does not exist\), first '.*nowhere.png'",
    ):
        read_index(source)


def test_reading_a_csv_or_a_folder_imports_no_heavy_library(drawings):
    code = (
        "import sys; from pathlib import Path; from tracer.data.build import read_index;"
        f"read_index(Path({str(drawings / 'train.csv')!r}));"
        "heavy = {'torch', 'open_clip', 'nvidia.dali', 'deepspeed', 'triton', 'PIL'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
