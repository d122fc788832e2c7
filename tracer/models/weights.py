"""Weights as safetensors files that plain open_clip loads."""

from __future__ import annotations

import errno
import math
import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tracer.files import whole_file
from tracer.models.clip import MAX_LOGIT_SCALE


def save_weights(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a checkpoint that ``open_clip.create_model(name, pretrained=path)`` loads.

    The logit scale is written with its bound, log ``MAX_LOGIT_SCALE``; all other tensors as they are.

    Raises:
        OSError: the file cannot be written; with the operating system's own number, whatever the library says.
    """
    state = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    if "logit_scale" in state:
        state["logit_scale"].clamp_(max=math.log(MAX_LOGIT_SCALE))
    with whole_file(path) as part:
        try:
            save_file(state, part, metadata)
        except SafetensorError as error:  # safetensors hides the system's error in its text
            number = re.search(r"os error (\d+)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error
