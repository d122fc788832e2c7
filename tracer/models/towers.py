"""How the towers of a dual encoder run: with activations that are computed again, and compiled."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn


def checkpoint_activations(model: Any) -> None:
    """Let both towers of an open_clip model forget the activations inside their blocks.

    The backward pass computes them again, with the same random numbers: an adapter that was dropped is dropped
    again. Where a tower cannot do so (open_clip's ResNets), it keeps its activations, and a warning says it.
    """
    model.set_grad_checkpointing(True)
    if hasattr(model.visual, "layer1"):
        warnings.warn("the image tower is a ResNet, which keeps its activations all the same", stacklevel=2)
    text: Any = getattr(getattr(model, "text", None), "transformer", None)
    if hasattr(text, "gradient_checkpointing_enable"):  # Hugging Face's, which may choose another kind
        text.gradient_checkpointing_enable({"use_reentrant": False})


def compile_towers(model: Any, **options: Any) -> None:
    """Compile both towers of an open_clip model in place; its state dict keeps its keys.

    Args:
        model: changed in place.
        options: of ``torch.compile``.
    """
    text: nn.Module = model.text if hasattr(model, "text") else model.transformer
    for tower in (model.visual, text):
        tower.compile(**options)
