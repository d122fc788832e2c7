"""The one place that imports Triton, and what the kernel files share about it.

``TRITON_INTERPRET=1``, set before this module is imported, makes Triton run kernels on CPU tensors,
one program after the other: that is how the real kernels are tested on a machine without a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["INTERPRETED", "device_guard", "require_device", "tl", "triton"]

INTERPRETED: bool = triton.knobs.runtime.interpret


def require_device(tensor: Tensor, instead: str = "blocked") -> None:
    """Refuse tensors that Triton can't reach.

    Args:
        tensor: one that a kernel is to read.
        instead: the implementation that works on the tensor's device.

    Raises:
        ValueError: for a CPU tensor outside the interpreter; names ``instead``.
    """
    if not (tensor.is_cuda or INTERPRETED):
        raise ValueError(
            f"impl='triton' needs tensors on a GPU, got {tensor.device}: use impl='{instead}', "
            "or set TRITON_INTERPRET=1 before the import to run the kernels under Triton's interpreter"
        )


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's own device current: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
