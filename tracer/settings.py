"""The check of numbers that the settings of every command share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
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


def check_set_names(option: str, names: Iterable[str]) -> None:
    """Check the names of evaluation sets, each of which is part of an option's name on the command line.

    Args:
        option: without dashes: ``eval_data`` or ``kinds``.
        names: as the user gave them.

    Raises:
        UserError: a name is empty or holds a dot.
    """
    for name in names:
        if not name:
            raise UserError(f"--{option} names no set: write --{option}.NAME, with a name of your choice")
        if "." in name:
            raise UserError(
                f"--{option}.{name}: the name of a set holds no dots, write --{option}.{name.replace('.', '_')}"
            )
