"""What every reader of a data set yields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Sample(NamedTuple):
    """A picture with the id of its class, or None where it has no label, and its captions, if any.

    A picture is a file of its own, or a member of a shard (an uncompressed tar file).

    Attributes:
        file: path or address of the picture's file, or of its shard.
        label: id of its class.
        captions: texts; may be empty where the sample has a label.
        key: name within the shard; empty for a file of its own.
        offset, size: where a member's bytes lie in its shard; size −1 means the whole file.
        seen: what a reader already knows of a member: "FORMAT" and flags, see ``check.py``.
    """

    file: str
    label: str | None
    captions: Sequence[str]
    key: str = ""
    offset: int = 0
    size: int = -1
    seen: str = ""


class Fault(NamedTuple):
    """Something that a data set names and that cannot be used: its id, and the reason in words."""

    id: str
    reason: str
