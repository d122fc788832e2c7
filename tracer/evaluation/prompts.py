"""Prompts of the classes for zero-shot classification."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tracer.data.index import Index
from tracer.data.text import TEMPLATE, words
from tracer.errors import UserError
from tracer.models.registry import Tokenizer
from tracer.words import counted


def names_of(training: Index, sets: list[Index]) -> dict[str, str]:
    """Return the display names of the classes of the training data and of evaluation sets, by their ids."""
    known = {name: words for index in sets for name, words in index.names.items()}
    return known | training.names


def named_alike(*indexes: Index) -> set[str]:
    """Return the ids of classes that a data set itself gives the name of another class, as ImageNet does twice."""
    alike: set[str] = set()
    for index in indexes:
        counts = Counter(index.names.values())
        alike |= {n for n, words in index.names.items() if index.about.named and counts[words] > 1}
    return alike


def class_prompts(
    path: Path | None,
    classes: list[str],
    names: Mapping[str, str] | None = None,
    templates: Sequence[str] = (TEMPLATE,),
) -> dict[str, list[str]]:
    """Return the prompts of each class, in the order of the class numbers.

    Args:
        path: JSON file {class: [prompt, …]}; None means the templates with the name of each of ``classes``.
        classes: ids of the classes, not used where a file is given.
        names: display names of the classes; default: their ids in words.
        templates: prompts with ``{}`` for the name of a class.

    Raises:
        UserError: the file is missing or malformed, or there are fewer than two classes.
    """
    names = names or {}
    prompts = (
        {each: [t.replace("{}", names.get(each) or words(each)) for t in templates] for each in classes}
        if path is None
        else _read_prompts(path)
    )
    where = f"classes file '{path}'" if path else "the data"
    if not prompts:
        raise UserError(f"{where} names no class: label the pictures, or give the classes in --classes")
    if len(prompts) < 2:
        raise UserError(
            f"{where} has one class ('{next(iter(prompts))}'): a classifier needs at least two, "
            "so label the pictures or give more in --classes"
        )
    return prompts


def _read_prompts(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        raise UserError(f"classes file '{path}' does not exist: check --classes")
    try:
        prompts = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repeats)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"classes file '{path}' is not JSON in UTF-8 ({error}): give {{class: [prompt, …]}}"
        ) from error
    except UserError as error:
        raise UserError(f"classes file '{path}' {error}") from error
    if not isinstance(prompts, dict) or not all(
        isinstance(group, list)
        and group
        and all(isinstance(prompt, str) and prompt.strip() for prompt in group)
        for group in prompts.values()
    ):
        raise UserError(
            f"classes file '{path}' must hold {{class: [prompt, …]}}, "
            "a list of at least one string for each class, none empty"
        )
    return prompts


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dictionary; the parser itself would keep the last of two equal names silently."""
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise UserError(f"names '{repeated[0]}' twice: give each class once, with all its prompts")
    return dict(pairs)


def check_distinct(
    prompts: dict[str, list[str]], tokenizer: Tokenizer, named_alike: Collection[str] = ()
) -> None:
    """Raise UserError if two classes have the same prompts, so that one of them could never win.

    Prompts are the same if the model's tokenizer makes the same tokens of them: most ignore case and repeated
    spaces, and all ignore what lies beyond the context length. The order of a class's prompts does not matter.
    Classes of ``named_alike`` may be the same: their data set says so, and published results keep them apart.
    """
    names: dict[frozenset, str] = {}
    for name, group in prompts.items():
        counts = Counter(tuple(tokens) for tokens in tokenizer(group).tolist())
        divisor = math.gcd(*counts.values())  # the mean of prompts that are all given twice is the same
        other = names.setdefault(frozenset((tokens, n // divisor) for tokens, n in counts.items()), name)
        if other != name and not {other, name} <= set(named_alike):
            raise UserError(
                f"the classes '{other}' and '{name}' have the same prompts, such as '{group[0]}', so that one of "
                "them can never win: join them, or give them different prompts in --classes"
            )


def check_labelled(sets: list[Index]) -> None:
    """Raise UserError if a set has pictures without a label, which belong to no class."""
    for index in sets:
        missing = [index.id(int(row)) for row in np.flatnonzero(index.columns.label < 0)]
        if missing:
            how_many = (
                "no labels"
                if len(missing) == len(index)
                else f"{counted(len(missing), 'picture')} without a label"
            )
            raise UserError(
                f"'{index.name}' has {how_many}, first '{missing[0]}': zero-shot evaluation needs a label for "
                "every picture, so label them or leave them out; a set of captions alone is one for retrieval"
            )


def check_labels(sets: list[Index], prompts: dict[str, list[str]]) -> None:
    """Raise UserError if a set has pictures without a label, or a label that is not a class of ``prompts``."""
    check_labelled(sets)
    for index in sets:
        unknown = sorted(set(index.classes) - set(prompts))
        if unknown:
            raise UserError(
                f"'{index.name}' has {counted(len(unknown), 'label')} without prompts, first '{unknown[0]}': "
                "add what is missing to --classes or drop those rows"
            )
