"""Reader of folders with a sub-folder of pictures per class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath

from tracer.data.names import is_hidden, is_picture, note, tally
from tracer.data.sample import Sample
from tracer.errors import UserError
from tracer.words import counted

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval", "evaluation"}
SPLITS |= {"holdout", "held_out", "train_set", "val_set", "test_set"}
LISTS = {"classes.json", "classnames.txt", "zeroshot_classification_templates.txt"}  # files about the classes


def read_folder(source: Path) -> Iterator[Sample]:
    """Yield the pictures in the sub-folders of ``source``, at any depth, sorted by path.

    The sub-folder directly below ``source`` is the id of the class. Hidden files and folders are skipped. Other
    files are left out, and a note counts them and names the classes that this leaves without a picture: those
    directly in ``source``, and those with other suffixes than :data:`~tracer.data.names.SUFFIXES`.

    Raises:
        UserError: the classes are ``train``, ``val`` and the like, or a single folder of folders: the folder is
            one level too high.
    """
    files = sorted(_files(str(source)), key=lambda name: name.split(os.sep))
    images = [name for name in files if os.sep in name and is_picture(PurePath(name))]
    classes = sorted({name.partition(os.sep)[0] for name in images})
    _refuse_a_level_too_high(source, classes, images)
    _note_left_out(source, files, images, set(classes))
    for name in images:
        yield Sample(os.path.join(source, name), name.partition(os.sep)[0], ())


def folders_of(source: Path) -> list[str]:
    """Return a folder and the visible folders in it, at any depth; their times tell when a file came or went."""
    return [str(source), *(name for name, _ in _walk(str(source)) if name)]


def _files(source: str) -> Iterator[str]:
    """Yield the visible files in a folder, relative to it."""
    for name, is_folder in _entries(source):
        if not is_folder:
            yield name


def _walk(source: str) -> Iterator[tuple[str, bool]]:
    return ((os.path.join(source, name), True) for name, is_folder in _entries(source) if is_folder)


def _entries(source: str) -> Iterator[tuple[str, bool]]:
    """Yield what is visible in a folder, at any depth, relative to it, and whether it is a folder itself.

    A link to a folder is followed where it is a class folder, directly in ``source``.
    """
    waiting = [""]
    while waiting:
        parent = waiting.pop()
        with os.scandir(os.path.join(source, parent) if parent else source) as entries:
            for entry in entries:
                if is_hidden(PurePath(entry.name)):
                    continue
                name = os.path.join(parent, entry.name) if parent else entry.name
                if entry.is_dir(follow_symlinks=not parent):
                    waiting.append(name)
                    yield name, True
                elif not entry.is_dir():
                    yield name, False


def _refuse_a_level_too_high(source: Path, classes: list[str], images: list[str]) -> None:
    parts = [name.split(os.sep) for name in images]
    splits = [name for name in classes if name.lower() in SPLITS]
    depths = {len(names) for names in parts}
    if splits and (len(splits) == len(classes) or (len(splits) > 1 and max(depths) > 2)):
        first = next((name for name in splits if name.lower().startswith("train")), splits[0])
        raise UserError(
            f"'{source}' has the classes {named(classes)}, which look like parts of a data set: "
            f"did you mean '{source / first}'?"
        )
    inner = {names[1] for names in parts}
    if len(classes) == 1 and min(depths) > 2 and len(inner) > 1:
        raise UserError(
            f"'{source}' has the single class {named(classes)}, which holds {len(inner)} folders: "
            f"did you mean '{source / classes[0]}'?"
        )


def _note_left_out(source: Path, files: list[str], images: list[str], classes: set[str]) -> None:
    """Say once how many files were left out, why, and which classes this leaves empty."""
    taken, reasons = set(images), Counter[str]()
    for name in files:
        if name not in taken and name not in LISTS:
            path = PurePath(name)
            outside = os.sep not in name and is_picture(path)
            reasons["outside a class folder" if outside else path.suffix.lower() or "without a suffix"] += 1
    with os.scandir(source) as entries:
        folders = {e.name for e in entries if e.is_dir() and not is_hidden(PurePath(e.name))}
    empty = sorted(folders - classes)
    lines = []
    if reasons:
        files_ = counted(reasons.total(), "file that is not a picture", "files that are not pictures")
        lines.append(f"left out {files_} of a class ({tally(reasons)})")
    if empty:
        classes_ = counted(len(empty), "class", "classes")
        lines.append(f"left out {classes_} without a picture that can be read ({named(empty)})")
    if lines:
        note(f"'{source}': {'; '.join(lines)}")


def named(names: list[str], most: int = 5) -> str:
    """Return the first names in quotes, and how many more there are."""
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([f"'{name}'" for name in names[:most]] + more)
