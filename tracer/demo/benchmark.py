"""The demo's data set on disk."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tracer.demo.packages import _describe, download
from tracer.demo.split import _repeats, ambiguous, fingerprints, groups, split
from tracer.demo.themes import (
    HANDS,
    LINE,
    TRAIN_FAMILY,
    Drawing,
    captions,
    class_of,
    on_paper,
    one_ink,
    read_classes,
    read_themes,
    render_all,
    words,
)
from tracer.files import whole_folder

RECIPE = 1  # raised whenever the same packages would give other files

KINDS = {
    "shaded": "in-distribution",
    "smooth": "near",
    "square": "shifted",
    "flat": "shifted",
    LINE: "shifted",
}


@dataclass
class Benchmark:
    """Files of the prepared benchmark; ``eval_data`` in the order of KINDS, the first in-distribution."""

    train_data: Path
    eval_data: dict[str, Path]
    kinds: dict[str, str]
    classes: Path


@dataclass
class _Pictures:
    """Rendered drawings of the benchmark's classes and their sides."""

    drawings: list[Drawing]
    rgb: np.ndarray
    labels: np.ndarray
    families: np.ndarray
    prints: np.ndarray
    test: np.ndarray
    ambiguous: int


def _benchmark_pictures(drawings: list[Drawing], classes: dict[str, str], workers: int) -> _Pictures:
    named = [d for d in drawings if d.hand in HANDS and class_of(d, classes)]
    named, rgba = render_all(named, workers)
    rgb = on_paper(rgba)
    lines = one_ink(rgba)
    labels = np.array([class_of(d, classes) for d in named], dtype=object)
    families = np.array(
        [LINE if line else HANDS[d.hand][1] for d, line in zip(named, lines, strict=True)], dtype=object
    )
    prints = fingerprints(rgb)
    bad = ambiguous(labels, rgb, prints)
    keep = np.flatnonzero(~bad)
    named = [named[i] for i in keep]
    rgb, labels, families, prints = rgb[keep], labels[keep], families[keep], prints[keep]
    styles = [f"{d.hand}/{line}" for d, line in zip(named, lines[keep], strict=True)]
    test = split(labels, families, groups(labels, styles, prints), [d.key for d in named])
    return _Pictures(named, rgb, labels, families, prints, test, int(bad.sum()))


def prepare(root: Path, workers: int = 2) -> Benchmark:
    """The benchmark below ``root``, built when it is not there yet (about 100 MB to download).

    Downloaded packages are kept in ``packages`` beside ``root``.

    Raises:
        UserError: packages that cannot be had; see :func:`download`.
    """
    if not _is_prepared(root):
        shutil.rmtree(root, ignore_errors=True)
        files = download(sorted({package for package, _ in HANDS.values()}), root.parent / "packages")
        drawings = read_themes(files, HANDS, workers)
        with whole_folder(root) as folder:
            _write(folder, files, drawings, workers)
    return Benchmark(
        train_data=root / "train.csv",
        eval_data={family: root / "eval" / f"{family}.csv" for family in KINDS},
        kinds=dict(KINDS),
        classes=root / "classes.json",
    )


def _is_prepared(root: Path) -> bool:
    manifest = root / "manifest.json"
    return manifest.is_file() and json.loads(manifest.read_text()).get("recipe") == RECIPE


def _write(folder: Path, files: dict[str, Path], drawings: list[Drawing], workers: int) -> None:
    classes, phrases = read_classes()
    known = {d.name for d in drawings}
    p = _benchmark_pictures(drawings, classes, workers)
    train = ~p.test & (p.families == TRAIN_FAMILY)
    learnt = set(p.labels[train])
    chosen = p.test & np.array([label in learnt for label in p.labels], bool)
    rows = np.flatnonzero(chosen)
    repeat = _repeats(p.labels[rows], p.families[rows], p.prints[rows])
    chosen[rows[repeat]] = False

    texts = [captions(d, c, phrases[c], known) for d, c in zip(p.drawings, p.labels, strict=True)]
    sets = {"train": train} | {f"eval/{family}": chosen & (p.families == family) for family in KINDS}
    with tqdm(total=int(sum(s.sum() for s in sets.values())), desc="writing pictures", unit="icon") as bar:
        for name, members in sets.items():
            path = folder / f"{name}.csv"
            path.parent.mkdir(exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(("image", "label", "captions"))
                for i in np.flatnonzero(members):
                    picture = folder / "pictures" / f"{p.drawings[i].key}.png"
                    picture.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(p.rgb[i]).save(picture)
                    relative = os.path.relpath(picture, path.parent)
                    writer.writerow((relative, p.labels[i], "|".join(dict.fromkeys(texts[i]))))
                    bar.update()
    prompts = {label: list(dict.fromkeys([*phrases[label], words(label)])) for label in sorted(learnt)}
    (folder / "classes.json").write_text(json.dumps(prompts, indent=1))
    manifest = {
        "recipe": RECIPE,
        "packages": {name: _describe(name, path) for name, path in sorted(files.items())},
        "sets": {
            name: {
                "pictures": int(members.sum()),
                "classes": len(set(p.labels[members])),
                "hands": dict(Counter(p.drawings[i].hand for i in np.flatnonzero(members))),
            }
            for name, members in sets.items()
        },
        "left_out": {
            "stands for two classes": p.ambiguous,
            "test picture that repeats another": int(repeat.sum()),
            "test picture of a class without training pictures": int((p.test & ~chosen).sum() - repeat.sum()),
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
