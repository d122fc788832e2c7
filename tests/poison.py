"""Poison for fresh memory: ``torch.empty`` and its relatives return NaN (integers: a large odd number).

torch can do this itself while its deterministic mode is on, but then it also fills DeepSpeed's buffers of
gigabytes, which takes minutes of the test run, and it replaces algorithms whose repeatability is to be tested.
This module fills only the memory that code of this repository asks for, and writes the bytes directly, so that
no counter of operations sees it.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

ROOT = str(Path(__file__).parent.parent)


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        if not torch.compiler.is_compiling() and _is_ours(sys._getframe(1).f_code.co_filename):
            fill(tensor)
        return tensor

    return wrapper


# Made once: torch.compile keeps a table of the functions that it knows, by identity.
POISONED = [
    (owner, name, _poisoned(getattr(owner, name)))
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    )
    for name in names
]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the functions that return fresh memory until the end of a test."""
    for owner, name, function in POISONED:
        monkeypatch.setattr(owner, name, function)


def _is_ours(file: str) -> bool:
    return file.startswith(ROOT) and "site-packages" not in file


def fill(tensor: torch.Tensor) -> None:
    """Overwrite the whole storage of a tensor that nothing else refers to; leaves meta and fake tensors alone."""
    if type(tensor) is not torch.Tensor or tensor.device.type not in ("cpu", "cuda"):
        return
    storage = tensor.untyped_storage()
    byte = _byte(tensor.dtype)
    if tensor.device.type == "cpu":
        ctypes.memset(storage.data_ptr(), byte, storage.nbytes())
    else:
        with _disable_current_modes():
            storage.fill_(byte)


def _byte(dtype: torch.dtype) -> int:
    """Return the byte that, repeated, is NaN in every floating-point format and 0x7f7f… in the integers."""
    if dtype.is_floating_point or dtype.is_complex:
        return 0xFF
    return 1 if dtype == torch.bool else 0x7F
