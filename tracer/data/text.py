"""Captions made from class names, and the files that give classes their names and prompts."""

from __future__ import annotations

import json
from pathlib import Path

from tracer.errors import UserError
from tracer.words import counted

TEMPLATE = "a photo of a {}"


def words(label: str) -> str:
    """Return a class id in words: its underscores and hyphens become spaces."""
    return label.replace("_", " ").replace("-", " ")


def read_templates(path: Path) -> list[str]:
    """Read a file with a template a line, in which ``{}`` or ``{c}`` stands for the name of the class.

    Raises:
        UserError: it cannot be read, is empty, or a line does not hold the place of the name.
    """
    lines = [line.strip().replace("{c}", "{}") for line in _lines(path)]
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"templates file '{path}' is empty: write a template a line, with {{}} for the name")
    for number, line in enumerate(lines, 1):
        if line.count("{}") != 1:
            raise UserError(
                f"templates file '{path}' line {number} ('{line[:60]}') must hold {{}} once, for the name"
            )
    return lines


def read_names(folder: Path, present: list[str]) -> tuple[list[str], list[str]] | None:
    """Read ``classes.json`` or ``classnames.txt`` of a data set: return class ids and their display names.

    ``classes.json`` holds {id: name}. A line of ``classnames.txt`` is ``id name``, where every line begins with
    an id of ``present`` or of its kind, or else the name of the class with the line's number in sorted order.

    Args:
        folder: of the data set.
        present: ids of the classes that have pictures, sorted.

    Returns:
        None where there is neither file.

    Raises:
        UserError: a file does not fit the classes.
    """
    path = folder / "classes.json"
    if path.is_file():
        return _from_json(path, present)
    path = folder / "classnames.txt"
    if not path.is_file():
        return None
    lines = [line.strip() for line in _lines(path)]
    lines = [line for line in lines if line]
    heads = [line.split(maxsplit=1) for line in lines]
    known = set(present)
    if present and all(len(head) == 2 for head in heads) and known <= {head[0] for head in heads}:
        return [head[0] for head in heads], [head[1] for head in heads]
    numbers = [str(n) for n in range(len(lines))]
    if known <= set(numbers):
        return numbers, lines
    if len(lines) != len(present):
        raise UserError(
            f"'{path}' names {counted(len(lines), 'class', 'classes')} and the data has {len(present)}: "
            "write a line for each class in sorted order, or 'id name' on each line"
        )
    return present, lines


def _from_json(path: Path, present: list[str]) -> tuple[list[str], list[str]]:
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON in UTF-8 ({error}): give {{id: name}}") from error
    if not isinstance(names, dict) or not all(isinstance(n, str) and n.strip() for n in names.values()):
        raise UserError(f"'{path}' must hold {{id: name}}, with a name for each class")
    unknown = sorted(set(present) - set(names))
    if unknown:
        count = counted(len(unknown), "class", "classes")
        raise UserError(f"'{path}' has no name for {count}, first '{unknown[0]}': add what is missing")
    return list(names), list(names.values())


def sorted_ids(labels: list[str]) -> list[str]:
    """Return class ids sorted, whole numbers by their value."""
    if labels and all(label.isascii() and label.isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not text in UTF-8 ({error}): save it again") from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): check the path") from error
