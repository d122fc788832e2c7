"""Checks that the settings of every command share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tracer.errors import UserError

# What a number must be, in the words of the message.
MUST_BE: dict[str, Callable[[float], bool]] = {
    "at least 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "above 0": lambda x: x > 0,
    "above 0 and at most 1": lambda x: 0 < x <= 1,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "from 0 to 1": lambda x: 0 <= x <= 1,
    "from 0 to 2147483647": lambda x: 0 <= x < 2**31,  # what every random generator in use takes
}


def check_ranges(settings: Any, ranges: dict[str, str]) -> None:
    """Raise UserError for the first number that is not what ``ranges`` says, {must be: names}, or not finite."""
    for must, names in ranges.items():
        for name in names.split():
            value = getattr(settings, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not (math.isfinite(number) and MUST_BE[must](number)):
                    raise UserError(f"--{name} is {number}: it must be {must}")
