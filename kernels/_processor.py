"""What this machine's processor can do, as far as the choice of an implementation depends on it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch


def bfloat16_unit() -> str | None:
    """Return the processor's unit that multiplies bfloat16: "AMX", "AVX-512", or None if it has neither."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX-512" if torch.cpu._is_avx512_bf16_supported() else None


@cache
def mkl_knows_this_processor() -> bool:
    """Return whether float32 products go to MKL, which takes its AVX-512 kernels on Intel's processors only."""
    cpuinfo = Path("/proc/cpuinfo")
    intel = cpuinfo.is_file() and "GenuineIntel" in cpuinfo.read_text()
    return (intel and torch.backends.mkl.is_available()) or not torch.backends.mkldnn.is_available()
