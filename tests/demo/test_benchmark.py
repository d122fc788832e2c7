"""The benchmark on disk, and the corpus beside it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from demo.icon_files import CLASSES, icon
from PIL import Image

from tracer.data.build import read_index
from tracer.demo import benchmark, captions, packages, render, split, themes
from tracer.demo.corpus import build_corpus
from tracer.files import claim_folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_prepare_writes_a_benchmark_that_the_loader_reads(small_world):
    prepared = benchmark.prepare(small_world / "icons")
    prompts = json.loads(prepared.classes.read_text())
    train = read_index(prepared.train_data)
    assert set(train.labels) == set(CLASSES) == set(prompts)
    assert {p.parent.parent.name for p in train.images} == {"gnome", "Tango"}
    assert prompts["edit-cut"] == ["cut", "scissors", "edit cut"]
    seen = {p.resolve() for p in train.images}
    for family, path in prepared.eval_data.items():
        test = read_index(path)
        assert not seen & {p.resolve() for p in test.images}
        seen |= {p.resolve() for p in test.images}
        assert family == themes.LINE or {themes.THEMES[p.parent.parent.name][1] for p in test.images} == {
            family
        }
        assert set(test.labels) <= set(prompts)
    for row in rows_of(prepared.train_data):
        assert row["label"] in row["image"]
        assert len(row["captions"].split("|")) == len(set(row["captions"].split("|"))) > 1
        with Image.open(prepared.train_data.parent / row["image"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (64, 64))
    manifest = json.loads((small_world / "icons/manifest.json").read_text())
    assert manifest["sets"]["train"]["pictures"] == len(train)
    assert set(manifest["packages"]) == {package for package, _ in themes.THEMES.values()}


def test_copies_of_a_drawing_are_on_one_side(small_world):
    prepared = benchmark.prepare(small_world / "icons")
    train = {r["image"] for r in rows_of(prepared.train_data) if r["label"] == "edit-cut"}
    # gnome's and Tango's scissors are one group, so both teach and no shaded one is left to test
    assert {Path(i).parts[1] for i in train} == {"gnome", "Tango"}
    assert "edit-cut" not in {r["label"] for r in rows_of(prepared.eval_data["shaded"])}


def test_prepare_reuses_what_is_whole_and_rebuilds_what_is_not(small_world):
    root = small_world / "icons"
    claim_folder(small_world / "icons.part")  # of an attempt that was killed
    (small_world / "icons.part/pictures").mkdir()
    benchmark.prepare(root)
    assert sorted(p.name for p in small_world.iterdir()) == ["icons", "packages"]
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    benchmark.prepare(root)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    manifest = json.loads((root / "manifest.json").read_text()) | {"recipe": 0}
    (root / "manifest.json").write_text(json.dumps(manifest))
    (root / "train.csv").unlink()
    benchmark.prepare(root)
    assert (root / "train.csv").is_file()


def test_failure_while_writing_leaves_nothing_that_looks_whole(small_world, monkeypatch):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", lambda *a, **k: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left"):
        benchmark.prepare(small_world / "icons")
    assert sorted(p.name for p in small_world.iterdir()) == ["packages"]


def test_corpus_holds_neither_test_nor_training_pictures_nor_their_copies(small_world):
    prepared = benchmark.prepare(small_world / "icons")
    files = packages.download(list(packages.packages()), small_world / "packages")
    icons = themes.read_themes(files, themes.THEMES | themes.PRETRAINING_THEMES, 1)
    # one more theme draws a test picture again, in other colours and under another name
    row = next(r for r in rows_of(prepared.eval_data["flat"]) if "symbolic" not in r["image"])
    original = next(d for d in icons if d.key in row["image"])
    icons.append(icon("my-app", original.data, theme="oxygen", path="usr/copy.png"))
    built = build_corpus(icons, *captions.read_classes(), size=64, workers=1)

    def prints(pictures):
        return split.fingerprints(render.on_paper(np.stack(pictures)))

    corpus_prints = prints(built.pictures)  # opaque inside, so premultiplied or not is the same to an eye
    benchmark_pictures = [prepared.train_data, *prepared.eval_data.values()]
    benchmark_prints = split.fingerprints(
        np.stack(
            [np.asarray(Image.open(f.parent / r["image"])) for f in benchmark_pictures for r in rows_of(f)]
        )
    )
    assert (corpus_prints @ benchmark_prints.T).max() < split.ANY_CLASS_ALIKE
    assert len(built.pictures) == len(built.captions) == len(built.labels) == len(built.named) > 20
    assert built.named.any()
    assert not built.named.all()
    apps = [texts for texts in built.captions if "my app" in texts]
    assert len({int(n) for n, c in zip(built.labels, built.captions, strict=True) if "my app" in c}) == 1
    assert len(apps) >= 10  # six themes in two styles, less what looks like a test picture


def test_validation_and_test_divide_the_home_set(small_world):
    prepared = benchmark.prepare(small_world / "icons", workers=1)
    paths = (prepared.eval_data["shaded"], prepared.validation, prepared.rest)
    whole, validation, rest = ([row["image"] for row in rows_of(path)] for path in paths)
    assert validation
    assert sorted(validation + rest) == sorted(whole)
    assert {row["group"] for row in rows_of(prepared.eval_data["shaded"])} == {"gnome", "Tango"}


def test_a_group_is_validated_as_a_whole():
    home, group = np.arange(60) % 5 > 0, np.arange(60) // 4
    chosen = split.validated(home, group, [f"icon {n}" for n in range(60)])
    assert not (chosen & ~home).any()
    for number in range(15):
        assert len(set(chosen[home & (group == number)].tolist())) == 1
    assert 0 < chosen.sum() < home.sum()
