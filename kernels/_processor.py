"""What this machine's processor can do, as far as the choice of an implementation depends on it."""

from __future__ import annotations

import torch


def bfloat16_unit() -> str | None:
    """Return the processor's unit that multiplies bfloat16: "AMX", "AVX-512", or None if it has neither."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX-512" if torch.cpu._is_avx512_bf16_supported() else None
