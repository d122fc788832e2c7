"""The icon benchmark on disk: pictures, CSV files, prompts, and a manifest of where they come from."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tracer.demo.captions import captions, class_of, read_classes, words
from tracer.demo.packages import describe, download
from tracer.demo.render import has_one_ink, on_paper, render_all
from tracer.demo.split import ambiguous, fingerprints, groups, repeats, split, validated
from tracer.demo.themes import LINE, THEMES, TRAIN_FAMILY, Icon, read_themes
from tracer.files import remove_folder, whole_folder, write_json

RECIPE = 2  # raised whenever the same packages would give other files

# family of themes → its role as an evaluation set, seen from the training data
FAMILY_ROLES = {
    "shaded": "in-distribution",
    "smooth": "near",
    "square": "shifted",
    "flat": "shifted",
    LINE: "shifted",
}


HOME = next(family for family, role in FAMILY_ROLES.items() if role == "in-distribution")


@dataclass
class Benchmark:
    """Files of the prepared benchmark; ``eval_data`` is in the order of FAMILY_ROLES, in-distribution first.

    ``validation`` and ``rest`` divide the in-distribution test pictures, a group as a whole.
    """

    train_data: Path
    eval_data: dict[str, Path]
    roles: dict[str, str]
    classes: Path
    validation: Path
    rest: Path


@dataclass
class Pictures:
    """The icons of the benchmark's classes, rendered and split; each field but the last has n entries.

    ``rgb`` [n, S, S, 3] uint8, ``labels`` and ``families`` [n] str, ``prints`` [n, 576] float32 (see
    :func:`tracer.demo.split.fingerprints`), ``groups`` [n] int, ``test`` [n] bool. ``ambiguous`` counts the icons
    that were left out because they stand for two classes.
    """

    icons: list[Icon]
    rgb: np.ndarray
    labels: np.ndarray
    families: np.ndarray
    prints: np.ndarray
    groups: np.ndarray
    test: np.ndarray
    ambiguous: int


def prepare(root: Path, workers: int = 2) -> Benchmark:
    """Return the benchmark below ``root``; build it first if it is not there (about 100 MB to download).

    Downloaded packages are kept in ``packages`` beside ``root``.

    Raises:
        UserError: a package cannot be downloaded; see :func:`tracer.demo.packages.download`.
    """
    if not _is_prepared(root):
        if os.path.lexists(root):
            remove_folder(root)
        files = download(sorted({package for package, _ in THEMES.values()}), root.parent / "packages")
        icons = read_themes(files, THEMES, workers)
        with whole_folder(root) as folder:
            _write(folder, files, icons, workers)
    return Benchmark(
        train_data=root / "train.csv",
        eval_data={family: root / "eval" / f"{family}.csv" for family in FAMILY_ROLES},
        roles=dict(FAMILY_ROLES),
        classes=root / "classes.json",
        validation=root / "eval" / "validation.csv",
        rest=root / "eval" / f"{HOME}-test.csv",
    )


def _is_prepared(root: Path) -> bool:
    manifest = root / "manifest.json"
    return manifest.is_file() and json.loads(manifest.read_text()).get("recipe") == RECIPE


def labelled_pictures(icons: list[Icon], classes: dict[str, str], workers: int) -> Pictures:
    """Render the icons that belong to a class and split them into training and test pictures.

    Args:
        icons: icons of any themes; those of :data:`THEMES` alone are used.
        classes: icon name → class.
    """
    labelled, rgba = render_all([d for d in icons if d.theme in THEMES and class_of(d, classes)], workers)
    rgb, one_ink = on_paper(rgba), has_one_ink(rgba)
    labels = np.array([class_of(icon, classes) for icon in labelled], dtype=object)
    families = np.array(
        [LINE if line else THEMES[icon.theme][1] for icon, line in zip(labelled, one_ink, strict=True)],
        dtype=object,
    )
    prints = fingerprints(rgb)
    left_out = ambiguous(labels, rgb, prints)
    keep = np.flatnonzero(~left_out)
    labelled = [labelled[i] for i in keep]
    rgb, labels, families, prints = rgb[keep], labels[keep], families[keep], prints[keep]
    styles = [f"{icon.theme}/{line}" for icon, line in zip(labelled, one_ink[keep], strict=True)]
    group = groups(labels, styles, prints)
    test = split(labels, families, group, [icon.key for icon in labelled])
    return Pictures(labelled, rgb, labels, families, prints, group, test, int(left_out.sum()))


def _write(folder: Path, files: dict[str, Path], icons: list[Icon], workers: int) -> None:
    """Write the whole benchmark into ``folder``."""
    classes, phrases = read_classes()
    pictures = labelled_pictures(icons, classes, workers)
    train = ~pictures.test & (pictures.families == TRAIN_FAMILY)
    learnt = set(pictures.labels[train])
    chosen = pictures.test & np.array([label in learnt for label in pictures.labels], bool)
    rows = np.flatnonzero(chosen)
    repeated = repeats(pictures.labels[rows], pictures.families[rows], pictures.prints[rows])
    chosen[rows[repeated]] = False
    sets = {"train": train}
    sets |= {f"eval/{family}": chosen & (pictures.families == family) for family in FAMILY_ROLES}
    validation = validated(sets[f"eval/{HOME}"], pictures.groups, [icon.key for icon in pictures.icons])
    sets |= {"eval/validation": validation, f"eval/{HOME}-test": sets[f"eval/{HOME}"] & ~validation}

    known = {icon.name for icon in icons}
    texts = [
        captions(icon, label, phrases[label], known)
        for icon, label in zip(pictures.icons, pictures.labels, strict=True)
    ]
    with tqdm(total=int(sum(s.sum() for s in sets.values())), desc="writing pictures", unit="icon") as bar:
        for name, members in sets.items():
            _write_set(folder, folder / f"{name}.csv", np.flatnonzero(members), pictures, texts, bar)
    prompts = {label: list(dict.fromkeys([*phrases[label], words(label)])) for label in sorted(learnt)}
    write_json(folder / "classes.json", prompts)
    manifest = {
        "recipe": RECIPE,
        "packages": {name: describe(name, path) for name, path in sorted(files.items())},
        "sets": {name: _describe_set(pictures, members) for name, members in sets.items()},
        "left_out": {
            "stands for two classes": pictures.ambiguous,
            "test picture that repeats another": int(repeated.sum()),
            "test picture of a class without training pictures": int(
                (pictures.test & ~chosen).sum() - repeated.sum()
            ),
        },
    }
    write_json(folder / "manifest.json", manifest)


def _write_set(
    folder: Path, path: Path, rows: np.ndarray, pictures: Pictures, texts: list[list[str]], bar: tqdm
) -> None:
    """Write the pictures ``rows`` below ``folder`` and the CSV file at ``path`` that lists them."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "label", "captions", "group"))  # pictures of a hand are alike
        for i in rows:
            picture = folder / "pictures" / f"{pictures.icons[i].key}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures.rgb[i]).save(picture)
            relative = os.path.relpath(picture, path.parent)
            hand = pictures.icons[i].theme
            writer.writerow((relative, pictures.labels[i], "|".join(dict.fromkeys(texts[i])), hand))
            bar.update()


def _describe_set(pictures: Pictures, members: np.ndarray) -> dict[str, object]:
    """Return the manifest's entry of one set; ``members`` [n] bool."""
    return {
        "pictures": int(members.sum()),
        "classes": len(set(pictures.labels[members])),
        "hands": dict(Counter(pictures.icons[i].theme for i in np.flatnonzero(members))),
    }
