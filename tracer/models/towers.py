"""How the towers of a dual encoder run: in which order, with recomputed activations, masked, compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import open_clip
from open_clip.transformer import PatchDropout
from torch import Tensor, nn

from tracer.errors import UserError


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


def mask_patches(model: Any, share: float) -> None:
    """Let the image tower see only 1 − ``share`` of the patches of each picture while it trains.

    Other patches are drawn in each step, as in masked feature distillation (CLIP-KD, arXiv 2307.12732, section
    3.3) and its code, which drops them before the transformer. In evaluation mode, as a teacher is, all are seen.

    Raises:
        UserError: the tower is not a vision transformer of open_clip's own.
    """
    if not hasattr(model.visual, "patch_dropout"):
        raise UserError(
            f"--mask {share:g} needs an image tower that is a vision transformer of open_clip's: leave it out, "
            "or choose another --model"
        )
    model.visual.patch_dropout = PatchDropout(share)


def compile_towers(model: Any, **options: Any) -> None:
    """Compile both towers of an open_clip model in place; its state dict keeps its keys.

    Args:
        model: changed in place.
        options: of ``torch.compile``.
    """
    text: nn.Module = model.text if hasattr(model, "text") else model.transformer
    for tower in (model.visual, text):
        tower.compile(**options)


def encode_text_first(model: Any) -> bool:
    """Let a model of two separate towers encode the texts before the images, and return whether it does.

    Its call then takes ``with_text``, a function that is called with the text features between both towers. State
    dict, results and copies stay what they are. A model whose towers are not separate (CoCa, whose
    decoder reads both) or with another forward pass is left alone.

    Args:
        model: open_clip model, changed in place.
    """
    plain = (open_clip.CLIP.forward, open_clip.CustomTextCLIP.forward)
    if "forward" not in vars(model) and type(model).forward in plain:
        model.forward = MethodType(_text_first, model)  # of which a deep copy belongs to the copied model
    return getattr(model.forward, "__func__", None) is _text_first


def _text_first(
    model: Any,
    image: Tensor | None = None,
    text: Tensor | None = None,
    with_text: Callable[[Tensor], None] | None = None,
) -> Any:
    v = None if text is None else model.encode_text(text, normalize=True)
    if with_text is not None and v is not None:
        with_text(v)
    output = type(model).forward(model, image)
    if isinstance(output, dict):
        return output | {"text_features": v}
    return output[0], v, *output[2:]
