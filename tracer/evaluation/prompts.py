"""Prompts of the classes for zero-shot classification."""

from __future__ import annotations

import json
from pathlib import Path

from tracer.data.index import Index
from tracer.data.text import default_caption
from tracer.errors import UserError


def class_prompts(path: Path | None, classes: list[str]) -> dict[str, list[str]]:
    """Return the prompts of each class, in the order of the class numbers.

    Args:
        path: JSON file {class: [prompt, …]}; None means one prompt for each of ``classes``, made of its name.
        classes: names of the classes, not used where a file is given.

    Raises:
        UserError: the file is missing or malformed, or there are fewer than two classes.
    """
    prompts = {name: [default_caption(name)] for name in classes} if path is None else _read_prompts(path)
    if len(prompts) < 2:
        only = next(iter(prompts), "none")
        where = f"classes file '{path}'" if path else "the data"
        raise UserError(
            f"{where} has {len(prompts)} classes ('{only}'): a classifier needs at least two, "
            "so label the pictures or give more in --classes"
        )
    return prompts


def _read_prompts(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        raise UserError(f"classes file '{path}' does not exist: check --classes")
    try:
        prompts = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"classes file '{path}' is not JSON in UTF-8 ({error}): give {{class: [prompt, …]}}"
        ) from error
    if not isinstance(prompts, dict) or not all(
        isinstance(group, list) and group and all(isinstance(prompt, str) for prompt in group)
        for group in prompts.values()
    ):
        raise UserError(
            f"classes file '{path}' must hold {{class: [prompt, …]}}, a list of at least one string for each class"
        )
    return prompts


def check_labels(sets: list[Index], prompts: dict[str, list[str]]) -> None:
    """Raise UserError if a set has a label that is not a class of ``prompts``."""
    for index in sets:
        unknown = sorted(set(index.labels) - set(prompts))
        if unknown:
            raise UserError(
                f"'{index.name}' has {len(unknown)} labels without prompts, first '{unknown[0]}': "
                "add them to --classes or drop their rows"
            )
