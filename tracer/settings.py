"""What the settings of every command share: paths given as strings, and the check of their numbers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tracer.errors import UserError

# The condition on a number, under the words by which the message states it.
MUST_BE: dict[str, Callable[[float], bool]] = {
    "a finite number": lambda x: True,
    "at least 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "above 0": lambda x: x > 0,
    "above 0 and at most 1": lambda x: 0 < x <= 1,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "from 0 to 1": lambda x: 0 <= x <= 1,
    "from 0 to 2147483647": lambda x: 0 <= x < 2**31,  # every random generator in use takes these seeds
}


def as_paths(settings: Any) -> None:
    """Turn the strings in fields of a dataclass that hold paths into paths, in place."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if "Path" in str(field.type) and isinstance(value, str):
            setattr(settings, field.name, Path(value))
        elif "Path" in str(field.type) and isinstance(value, dict):
            setattr(settings, field.name, {name: Path(path) for name, path in value.items()})


def check_ranges(settings: Any, ranges: Mapping[str, str]) -> None:
    """Check that the numbers in ``settings`` are finite and in their ranges; None stands for "not set".

    Args:
        settings: a dataclass whose fields are numbers, tuples of numbers, or None.
        ranges: a key of :data:`MUST_BE` → names of fields, divided by spaces.

    Raises:
        UserError: names the first number that is out of range, and the range.
    """
    for must, names in ranges.items():
        for name in names.split():
            value = getattr(settings, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not (math.isfinite(number) and MUST_BE[must](number)):
                    raise UserError(f"--{name} is {number}: it must be {must}")


def check_set_names(option: str, names: Iterable[str], value: str = "") -> None:
    """Check the names of evaluation sets, each of which is part of an option's name on the command line.

    Args:
        option: without dashes: ``eval_data`` or ``kinds``.
        names: as the user gave them.
        value: of the option, which the remedy repeats.

    Raises:
        UserError: a name is empty or holds a dot.
    """
    for name in names:
        if not name:
            word = "-".join(re.findall(r"\w+", Path(value).stem)) or "NAME"
            if option == "kinds":
                raise UserError(
                    "--kinds names no set: write --kinds.NAME, with the name of an evaluation set"
                )
            raise UserError(
                f"--{option} names no set: write --{option}.NAME PATH with a name of your choice, such as "
                f"--{option}.{word} {value or 'photos/'}"
            )
        if "." in name:
            raise UserError(
                f"--{option}.{name}: the name of a set holds no dots, write --{option}.{name.replace('.', '_')}"
            )


def check_templates(templates: list[str], classes: Path | None) -> None:
    """Raise UserError for a prompt template without the place of the name, or beside a file of prompts."""
    if templates and classes is not None:
        raise UserError(
            "--prompt_template and --classes exclude each other: --classes gives every prompt itself"
        )
    for template in templates:
        if template != "openai" and template.count("{}") != 1:
            raise UserError(
                f"--prompt_template '{template}' must hold {{}} once, for the name of the class, or be openai"
            )
