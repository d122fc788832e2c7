"""Weights as safetensors files that plain open_clip loads."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from tracer.files import write_tensors
from tracer.models.clip import MAX_LOGIT_SCALE


def save_weights(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a checkpoint that ``open_clip.create_model(name, pretrained=path)`` loads.

    The logit scale is written with its bound, log ``MAX_LOGIT_SCALE``; all other tensors as they are.

    Raises:
        OSError: the file cannot be written.
    """
    if "logit_scale" in state:
        state = state | {"logit_scale": state["logit_scale"].detach().clamp(max=math.log(MAX_LOGIT_SCALE))}
    write_tensors(path, state, metadata)
