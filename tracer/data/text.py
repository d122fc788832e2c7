"""Captions made of class names."""

from __future__ import annotations


def default_caption(label: str) -> str:
    return f"a photo of a {label.replace('_', ' ').replace('-', ' ')}"
