"""Moving average over a whole list of tensors: ``average += weight · (param − average)``.

CPU path; the one-launch GPU kernel follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def average_(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    weight: float | Tensor,
    *,
    copies: Sequence[Tensor | None] | None = None,
    impl: str = "auto",
) -> None:
    """Move float32 ``averages`` towards ``params`` in place; write them to ``copies`` too."""
    averages, params = list(averages), list(params)
    if all(p.dtype is torch.float32 for p in params):
        torch._foreach_lerp_(averages, params, float(weight))
    else:
        for average, param in zip(averages, params, strict=True):
            average.lerp_(param.float(), float(weight))
    if copies is not None:
        for copy, average in zip(copies, averages, strict=True):
            if copy is not None:
                copy.copy_(average)
