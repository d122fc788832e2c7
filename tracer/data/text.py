"""Captions made from class names."""

from __future__ import annotations


def default_caption(label: str) -> str:
    """Return "a photo of a …" with the class name in words: its underscores and hyphens become spaces."""
    return f"a photo of a {label.replace('_', ' ').replace('-', ' ')}"
