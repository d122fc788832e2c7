"""The index, whatever it was read from, and that reading it needs no heavy library."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from functools import partial

import numpy as np
import pytest

from tracer.cli import main
from tracer.data import build
from tracer.data.build import read_index
from tracer.data.columns import About, Builder
from tracer.data.config import LoadingSettings
from tracer.data.index import Index
from tracer.data.sample import Sample
from tracer.data.strings import StringsBuilder
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


@pytest.fixture(autouse=True)
def every_index_is_kept(monkeypatch):
    monkeypatch.setattr(build, "KEPT_FROM", 0)


def settings(tmp_path, **changes) -> LoadingSettings:
    return LoadingSettings(cache=tmp_path / "cache", **changes)


def test_a_kept_index_is_mapped_until_its_source_changes(drawings, tmp_path, monkeypatch):
    data = shutil.copytree(drawings, tmp_path / "data")
    first = read_index(data / "train.csv", None, settings(tmp_path))
    assert isinstance(first.columns.file, np.memmap)
    monkeypatch.setattr("tracer.data.build._build", lambda *_: pytest.fail("it was built again"))
    again = read_index(data / "train.csv", None, settings(tmp_path))
    assert again.digest() == first.digest() == read_index_plain(monkeypatch, data / "train.csv").digest()
    (data / "train.csv").write_text((data / "train.csv").read_text() + "bar-47.png,bar,a bar\n")
    assert len(read_index(data / "train.csv", None, settings(tmp_path))) == 33


def read_index_plain(monkeypatch, source):
    """Read without a cache, whatever a test has replaced; later reads may build again."""
    monkeypatch.undo()
    return read_index(source)


def test_a_folders_index_is_built_anew_when_a_file_comes_or_is_repaired(tmp_path, drawings):
    pictures = sorted(drawings.glob("*.png"))[:6]
    for n, path in enumerate(pictures):
        (tmp_path / "data" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "data" / "ab"[n % 2] / path.name)
    read = partial(read_index, tmp_path / "data", None, settings(tmp_path, max_bad=0.5))
    assert len(read()) == 6
    bad = tmp_path / "data/a/bad.png"
    bad.write_bytes(pictures[0].read_bytes()[:80])
    index = read()
    assert len(index) == 6
    assert index.about.faults[0].id == str(bad)
    time.sleep(0.01)
    bad.write_bytes(pictures[0].read_bytes())  # in place: the folder's time stays
    assert len(read()) == 7
    (tmp_path / "data/c").mkdir()
    shutil.copy(bad, tmp_path / "data/c/new.png")
    assert read().classes == ["a", "b", "c"]


def test_a_repair_is_seen_however_many_faults_there_are(tmp_path, drawings, monkeypatch):
    monkeypatch.setattr("tracer.data.columns.MOST_FAULTS", 1)
    (tmp_path / "set.csv").write_text("image,label\n" + "".join(f"{n}.png,x\n" for n in range(4)))
    good = sorted(drawings.glob("*.png"))[0].read_bytes()
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(good if n < 2 else good[:80])
    read = partial(read_index, tmp_path / "set.csv", None, settings(tmp_path, max_bad=0.5))
    assert len(read()) == 2
    (tmp_path / "3.png").write_bytes(good)  # which is not the fault that is kept by name
    assert len(read()) == 3


def test_decoding_everything_is_remembered(tmp_path, drawings, monkeypatch):
    looked = []
    look = build.look_at_file
    monkeypatch.setattr(build, "look_at_file", lambda *a: looked.append(a[2]) or look(*a))
    source = drawings / "test.csv"
    for decode, expected in ((False, 16), (True, 32), (True, 32), (False, 32)):
        read_index(source, None, settings(tmp_path), decode=decode)
        assert len(looked) == expected
    assert looked == [False] * 16 + [True] * 16


def test_names_of_classes_are_not_their_ids(tmp_path, drawings):
    """Three ways to give them; two classes may share a name and stay two."""
    picture = next(drawings.glob("*.png"))
    for wnid in ("n01", "n02", "n03"):
        (tmp_path / "data" / wnid).mkdir(parents=True)
        shutil.copy(picture, tmp_path / "data" / wnid / "a.png")

    def read():
        index = read_index(tmp_path / "data", None, settings(tmp_path))
        return index.classes, index.names, index.captions[2]

    ids = ["n01", "n02", "n03"]
    assert read() == (ids, {n: n for n in ids}, ["a photo of a n03"])
    lines = tmp_path / "data/classnames.txt"
    lines.write_text("missile\nred fox\nmissile\n")
    expected = (ids, {"n01": "missile", "n02": "red fox", "n03": "missile"}, ["a photo of a missile"])
    assert read() == expected
    lines.write_text("n02 red fox\nn01 missile\nn03 missile\n")
    assert read() == (["n02", "n01", "n03"], expected[1], expected[2])
    lines.write_text("missile\nred fox\n")
    with pytest.raises(UserError, match=r"classnames.txt' names 2 classes and the data has 3"):
        read()
    names = tmp_path / "data/classes.json"
    names.write_text(json.dumps(expected[1] | {"n09": "empty"}))
    assert read()[0] == [*ids, "n09"]
    names.write_text(json.dumps({"n01": "missile"}))
    with pytest.raises(UserError, match=r"classes.json' has no name for 2 classes, first 'n02'"):
        read()


def test_classes_that_share_a_name_are_evaluated_apart(tmp_path, drawings, tiny_config):
    """ImageNet's 1000 classes have 998 names; without names of its own a data set's equal prompts are refused."""
    for wnid in ("hot_dog", "hot-dog", "cat"):
        (tmp_path / "data" / wnid).mkdir(parents=True)
        shutil.copy(next(drawings.glob("*.png")), tmp_path / "data" / wnid / "a.png")
    options = ["--model", str(tiny_config), "--pretrained", "null", "--cache", str(tmp_path / "cache")]
    command = ["evaluate", "--eval_data.set", str(tmp_path / "data"), *options]
    assert main(command) == 2
    (tmp_path / "data/classes.json").write_text(
        json.dumps({"hot_dog": "hot dog", "hot-dog": "hot dog", "cat": "cat"})
    )
    assert main(command) == 0


def test_rows_of_one_picture_are_one_sample_in_any_order(tmp_path, drawings, monkeypatch):
    """Also while the builder's table grows; each picture and each text is kept once."""
    for slots in (4, 1024):
        monkeypatch.setattr("tracer.data.strings.SLOTS", slots)
        builder = Builder(lambda _: io.BytesIO())
        for caption in range(4):
            for n in range(10):
                label = "even" if n % 2 == 0 and caption == 2 else None
                builder.add(Sample(f"{n}.png", label, (f"{n % 3} {caption}", "same")))
        columns, labels = builder.columns()
        index = Index("set", columns, About(classes=labels, names=labels))
        assert (len(columns.files), len(columns.texts)) == (10, 13)
        assert [str(path) for path in index.images] == [f"{n}.png" for n in range(10)]
        assert [sorted(set(texts)) for texts in index.captions] == [
            sorted({"same", *(f"{n % 3} {c}" for c in range(4))}) for n in range(10)
        ]
        assert index.labels == ["even" if n % 2 == 0 else None for n in range(10)]


def test_a_batch_draws_the_captions_that_single_pictures_have():
    """Their own, those of templates, and none twice as often as another."""
    builder, names = Builder(lambda _: io.BytesIO()), ["one", "two"]
    for n in range(30):
        builder.add(Sample(f"{n}.png", str(n % 2), [f"text {n % 7} {c}" for c in range(n % 4)]))
    index = Index(
        "set", builder.columns()[0], About(classes=["0", "1"], names=names), templates=["a {}", "{}s"]
    )
    rows, choice = np.random.default_rng(0).permutation(30), np.random.default_rng(1).random(30)
    expected = [
        index.captions[row][int(drawn * index.caption_count(row))]
        for row, drawn in zip(rows.tolist(), choice.tolist(), strict=True)
    ]
    assert index.drawn(rows, choice) == expected
    assert {"a one", "ones"} <= set(expected)


def test_a_sample_takes_less_than_100_bytes_beside_its_text(tmp_path, drawings):
    builder = Builder(lambda _: io.BytesIO())
    for n in range(1000):
        builder.add(Sample(f"{n:05}.png", str(n % 10), (f"text {n}",)))
    columns, _ = builder.columns()
    columns.save(tmp_path)
    size = sum(path.stat().st_size - 128 for path in tmp_path.glob("*.npy"))
    text = len(columns.files.blob) + len(columns.texts.blob)
    assert (size - text) / 1000 <= 100


def test_a_text_takes_little_memory_while_an_index_is_built():
    """However many distinct ones there are; a dictionary takes 200 bytes each."""
    count = 20_000
    with tempfile.TemporaryFile() as file:
        builder = StringsBuilder(file)
        tracemalloc.start()
        numbers = [
            builder.number(f"/data/pictures/{n % count:08}.jpg") == n % count for n in range(2 * count)
        ]
        used = tracemalloc.get_traced_memory()[0] - sys.getsizeof(numbers)
        tracemalloc.stop()
        assert all(numbers)
        assert len(builder) == count
        assert used / count < 40
        strings = builder.strings()
    assert [strings[n] for n in (0, 1, count - 1)] == [
        f"/data/pictures/{n:08}.jpg" for n in (0, 1, count - 1)
    ]


def test_many_rows_are_indexed_in_bounded_memory():
    """5,000 pictures with 80 templates each, a template at a time; CONTRIBUTING.md tells of ten million rows."""
    code = (
        "import io, resource, sys; from tracer.data.columns import Builder\n"
        "from tracer.data.sample import Sample\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "b = Builder(lambda _: io.BytesIO())\n"
        "for t in range(80):\n"
        "    for n in range(5000):\n"
        "        b.add(Sample(f'/data/pictures/{n:08}.jpg', None, (f'template {t} of {n % 1000}',)))\n"
        "c, _ = b.columns(); assert len(c.file) == len(c.files) == 5000 and len(c.captions) == 400000\n"
        "assert len(c.texts) == 80000\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 60  # MiB, beside Python and NumPy
