"""What every reader of a data set yields."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Sample(NamedTuple):
    """A picture with the name of its class, or None where it has no label, and one or more captions."""

    image: Path
    label: str | None
    captions: list[str]
