"""What this machine is: versions, processor, memory, device, and whether it multiplies bfloat16."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import tracer
from tracer.kernels._processor import (
    bfloat16_unit as bfloat16_unit,  # the kernels' own answer, for all others
)

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
    """Return the versions of this package, of Python and of the installed packages that decide results."""
    installed = {"tracer": tracer.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def machine() -> dict[str, object]:
    """Return processor, usable cores, memory in GiB and GPU (None without one), as a report names them."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def compute_device() -> torch.device:
    """Return the device that models run on when nothing else decides: the current GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def multiplies_bfloat16() -> bool:
    """Return whether this machine's GPU, or without one its processor, has instructions for bfloat16 products."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bfloat16_unit() is not None


def resolve_precision(precision: str) -> str:
    """Return what the setting ``precision`` means on this machine: ``auto`` becomes amp_bf16 or fp32."""
    if precision != "auto":
        return precision
    return "amp_bf16" if multiplies_bfloat16() else "fp32"
