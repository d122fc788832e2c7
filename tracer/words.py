"""Words of messages that depend on a number."""

from __future__ import annotations


def counted(count: float, noun: str, nouns: str = "") -> str:
    """Return a number with its noun: ``1 picture``, ``1,200 pictures``, ``0.5 epochs``.

    ``nouns`` is the plural where it is not the noun with an s.
    """
    shown = f"{count:,}" if isinstance(count, int) else f"{count:.3g}"
    return f"{shown} {noun if shown == '1' else nouns or noun + 's'}"
