"""Words of messages that depend on a number."""

from __future__ import annotations

from numbers import Integral


def counted(count: float, noun: str, nouns: str = "") -> str:
    """Return a number with its noun: ``1 picture``, ``1,200 pictures``, ``0.5 epochs``, ``1,707 epochs``.

    ``nouns`` is the plural where it is not the noun with an s.
    """
    whole = isinstance(count, Integral) or count >= 100
    shown = f"{count:,.0f}" if whole else f"{count:.3g}"
    return f"{shown} {noun if shown == '1' else nouns or noun + 's'}"
