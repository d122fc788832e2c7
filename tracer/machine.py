"""What this machine is: versions, processor, memory, device, and whether it multiplies bf16."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import tracer

PACKAGES = (
    "torch",
    "triton",
    "torchvision",
    "open_clip_torch",
    "deepspeed",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "numpy",
)


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of what decides the numbers."""
    found = {"tracer": tracer.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def machine() -> dict[str, object]:
    """Processor, usable cores, memory in GiB and GPU, as a report names them."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def compute_device() -> torch.device:
    """Where models run when nothing else decides: the current GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str) -> str:
    """What ``auto`` means on this machine; anything else as it is."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "amp_bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return (
        "amp_bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
    )
