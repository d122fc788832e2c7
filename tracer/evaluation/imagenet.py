"""ImageNet and the sets that share its classes: -V2, -Sketch, -A, -R and ObjectNet, as they lie on disk."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tracer.data.build import read_index
from tracer.data.config import LoadingSettings
from tracer.data.folder import named
from tracer.data.names import is_hidden, is_picture, note
from tracer.errors import UserError
from tracer.evaluation.sets import EvaluationSet
from tracer.models.imagenet import prompts, wnids
from tracer.words import counted

WNID = re.compile(r"n\d{8}")
SIZES = {"ImageNet": 50_000, "ImageNet-Sketch": 50_889, "ImageNet-V2": 10_000}
SIZES |= {"ImageNet-A": 7_500, "ImageNet-R": 30_000, "ObjectNet": 18_574}

# The names of files by which a set is told from another of the same classes.
FILES = {
    "ImageNet": re.compile(r"ILSVRC2012_val_\d{8}\..*"),
    "ImageNet-Sketch": re.compile(r"sketch_\d+\.JPEG"),
    "ImageNet-V2": re.compile(r"[0-9a-f]{40}\..*"),
    "ImageNet-A": re.compile(r"\d\.\d+_.*"),
    "ImageNet-R": re.compile(
        r"(art|cartoon|deviantart|embroidery|graffiti|graphic|misc|origami|painting|sculpture|sketch|sticker|tattoo"
        r"|toy|videogame)_\d+\.jpg"
    ),
}
OBJECTNET_CLASSES, BORDER = 113, 2  # classes that are also ImageNet's; pixels of the red border on each side
MAPPINGS = (
    "folder_to_objectnet_label.json",
    "objectnet_to_imagenet_1k.json",
    "imagenet_to_label_2012_v2",
    "pytorch_to_imagenet_2012_id.json",
)


def read_imagenet(path: Path, name: str, loading: LoadingSettings) -> list[EvaluationSet]:
    """Return the set of ImageNet's classes in a folder; none where it holds others, or names of its own.

    A folder of wnids is the set that the names of its files say, or else the one that has exactly these classes.
    Other folders of wnids are classified among their own classes. Folders ``0`` … ``999`` are class numbers.

    Raises:
        UserError: a folder is named like a wnid that is not one of ImageNet's, or ObjectNet's mappings are
            missing.
    """
    if not path.is_dir():
        return []
    if (path / "mappings").is_dir() or ((path / "images").is_dir() and "objectnet" in path.name.lower()):
        return [_objectnet(path, name, loading)]
    if any((path / own).is_file() for own in ("classes.json", "classnames.txt")):
        return []
    folders = sorted(e.name for e in os.scandir(path) if e.is_dir() and not is_hidden(Path(e.name)))
    if not folders:
        return []
    if all(f.isascii() and f.isdecimal() and int(f) < 1000 and f == str(int(f)) for f in folders):
        if len(folders) < 1000 and _file_layout(path, folders) != "ImageNet-V2":
            return []
        numbers = {str(n): (wnid,) for n, wnid in enumerate(wnids())}
        return [_known("ImageNet-V2", path, name, loading, numbers)]
    if 2 * sum(bool(WNID.fullmatch(f)) for f in folders) < len(folders):
        return []
    unknown = sorted(set(folders) - set(wnids()))
    if unknown:
        raise UserError(
            f"'{path}' has {counted(len(unknown), 'class folder')} whose name is not a wnid of ImageNet's 1000 "
            f"classes ({named(unknown)}): move away what does not belong, or name all classes in "
            f"'{path / 'classes.json'}' as {{id: name}}"
        )
    return [_of_wnids(path, name, loading, folders)]


def _of_wnids(path: Path, name: str, loading: LoadingSettings, folders: list[str]) -> EvaluationSet:
    """Return the set of a folder whose sub-folders are wnids of ImageNet."""
    exact = {tuple(wnids()): "ImageNet", wnids("a"): "ImageNet-A", wnids("r"): "ImageNet-R"}
    layout = _file_layout(path, folders) or exact.get(tuple(folders), "")
    subsets = {"ImageNet-A": wnids("a"), "ImageNet-R": wnids("r")}
    allowed = subsets.get(layout, wnids())
    if not layout or not set(folders) <= set(allowed):
        note(f"'{name}' has {len(folders)} of ImageNet's classes, and is classified among these alone")
        layout, allowed = "ImageNet classes", tuple(folders)
    classes = {wnid: (wnid,) for wnid in allowed} if len(allowed) < len(wnids()) else {}
    return _known(layout, path, name, loading, classes)


def _known(
    layout: str, path: Path, name: str, loading: LoadingSettings, classes: Mapping[str, tuple[str, ...]]
) -> EvaluationSet:
    return EvaluationSet(
        read_index(path, name, loading), layout, SIZES.get(layout), prompts=prompts(), classes=dict(classes)
    )


def _file_layout(path: Path, folders: Iterable[str]) -> str:
    """Return the set whose files are named as the first ones in these folders; empty where they do not agree."""
    firsts = []
    for folder in folders:
        names = (e.name for e in os.scandir(path / folder) if is_picture(Path(e.name)))
        firsts += [first] if (first := next(names, None)) else []
    return next((n for n, rule in FILES.items() if firsts and all(map(rule.fullmatch, firsts))), "")


def _objectnet(path: Path, name: str, loading: LoadingSettings) -> EvaluationSet:
    """Return ObjectNet's pictures of those classes that are also ImageNet's, without their red border.

    A class has the largest of the logits of its ImageNet classes, as in the code of WiSE-FT (arXiv 2109.01903).
    """
    classes = _objectnet_classes(path)
    index = replace(read_index(path / "images", name, loading), border=BORDER)
    mapped = np.array([label in classes for label in index.classes] + [False])
    index = index.take(np.flatnonzero(mapped[index.columns.label]))
    if len(classes) != OBJECTNET_CLASSES:
        here = counted(len(classes), "class", "classes")
        note(f"'{name}': its mappings name {here}, and ObjectNet's name {OBJECTNET_CLASSES}")
    return EvaluationSet(index, "ObjectNet", SIZES["ObjectNet"], prompts=prompts(), classes=classes)


def _objectnet_classes(path: Path) -> dict[str, tuple[str, ...]]:
    """Read the four mappings: {folder: the wnids that ObjectNet's authors give its label}."""
    folder = path / "mappings"
    for file in MAPPINGS:
        if not (folder / file).is_file():
            raise UserError(
                f"ObjectNet's mapping '{folder / file}' is missing: unpack the folder mappings of its download too"
            )
    label_of, labels, number_of = (_json(folder / MAPPINGS[n]) for n in (0, 1, 3))
    try:
        line_of = {int(line): int(number) for number, line in number_of.items()}  # class number of a line
        lines = (folder / MAPPINGS[2]).read_text(encoding="utf-8").splitlines()
        number = {label.strip(): line_of[n] for n, label in enumerate(lines) if n in line_of}
        folder_of = {label: name for name, label in label_of.items()}
        return {
            folder_of[label]: tuple(wnids()[number[each]] for each in imagenet.split("; "))
            for label, imagenet in labels.items()
        }
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"ObjectNet's mappings in '{folder}' do not fit together ({error!r}): unpack them again from its "
            f"download"
        ) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON in UTF-8 ({error}): unpack it again") from error
