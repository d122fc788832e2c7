"""Registry of the models that open_clip does not know, for :func:`~tracer.models.clip.load_clip`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

Tokenizer = Callable[[list[str]], Tensor]  # n strings → int64 tokens [n, context]

Loader = Callable[[Path | None], tuple[nn.Module, Tokenizer]]


class RegisteredModel(NamedTuple):
    """``load`` builds the model and its tokenizer from a checkpoint; ``weights`` is its default checkpoint."""

    load: Loader
    weights: Path


_MODELS: dict[str, RegisteredModel] = {}


def register_model(name: str, load: Loader, weights: Path) -> None:
    """Make ``name`` a model that :func:`~tracer.models.clip.load_clip` can load.

    Args:
        name: the name for ``--model``; it takes precedence over a model of open_clip with the same name.
        load: builds the model and its tokenizer from a checkpoint's path; None stands for ``weights``.
        weights: checkpoint that ``load`` reads when the user names none.
    """
    _MODELS[name] = RegisteredModel(load, weights)


def registered_model(name: str) -> RegisteredModel | None:
    """Return the model that was registered under ``name``, or None."""
    return _MODELS.get(name)


def registered_names() -> list[str]:
    """Return the names of all registered models, sorted."""
    return sorted(_MODELS)
