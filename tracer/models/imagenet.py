"""ImageNet's classes as the installed packages know them: wnids and subsets from timm, names from open_clip."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import open_clip

from tracer.models.clip import openai_templates


@cache
def wnids(subset: str = "") -> tuple[str, ...]:
    """Return the 1000 wnids of ImageNet in the order of its class numbers, or the 200 of a subset.

    Args:
        subset: ``a`` for ImageNet-A, ``r`` for ImageNet-R.
    """
    spec = importlib.util.find_spec("timm")  # its files alone: importing it takes seconds
    assert spec is not None  # open_clip depends on it
    assert spec.submodule_search_locations
    name = f"imagenet_{subset}_synsets.txt" if subset else "imagenet_synsets.txt"
    path = Path(spec.submodule_search_locations[0], "data", "_info", name)
    return tuple(path.read_text(encoding="ascii").split())


@cache
def names() -> dict[str, str]:
    """Return the name of each wnid. Two names occur twice ("missile", "sunglasses"), in published results too."""
    return dict(zip(wnids(), open_clip.IMAGENET_CLASSNAMES, strict=True))


@cache
def prompts() -> dict[str, list[str]]:
    """Return {wnid: its name in each of open_clip's 80 templates}, in the order of the class numbers."""
    templates = openai_templates()
    return {wnid: [t.replace("{}", name) for t in templates] for wnid, name in names().items()}
