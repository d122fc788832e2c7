"""Registry of the models that open_clip does not know, for :func:`~tracer.models.clip.load_clip`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

Tokenizer = Callable[[list[str]], Tensor]  # n strings → int64 tokens [n, context]

Loader = Callable[[Path | None], nn.Module]


class RegisteredModel(NamedTuple):
    """``load`` builds the model from a checkpoint, by default ``weights``; ``tokenizer`` makes that of its texts.

    ``config`` is the model's config in open_clip's words; None where it has none.
    """

    load: Loader
    tokenizer: Callable[[], Tokenizer]
    weights: Path
    config: dict[str, Any] | None = None


_MODELS: dict[str, RegisteredModel] = {}


def register_model(
    name: str,
    load: Loader,
    tokenizer: Callable[[], Tokenizer],
    weights: Path,
    config: dict[str, Any] | None = None,
) -> None:
    """Make ``name`` a model that :func:`~tracer.models.clip.load_clip` can load.

    Args:
        name: the name for ``--model``; it takes precedence over a model of open_clip with the same name.
        load: builds the model from a checkpoint's path; None stands for ``weights``.
        tokenizer: makes the tokenizer of its texts.
        weights: checkpoint that ``load`` reads when the user names none.
        config: model config with the keys of open_clip's; saved weights are described with it.
    """
    _MODELS[name] = RegisteredModel(load, tokenizer, weights, config)


def registered_model(name: str) -> RegisteredModel | None:
    """Return the model that was registered under ``name``, or None."""
    return _MODELS.get(name)


def registered_names() -> list[str]:
    """Return the names of all registered models, sorted."""
    return sorted(_MODELS)
