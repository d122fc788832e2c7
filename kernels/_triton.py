"""The one place that imports Triton: the device it runs on, and the door through which every launch passes.

``TRITON_INTERPRET=1``, set before this module is imported, makes Triton run kernels on CPU tensors, one program
after the other: that is how the real kernels are tested on a machine without a GPU.

:func:`recording` lists the launches that a call makes, with or without making them, and :func:`planning_for` makes
the launchers plan for a GPU that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "INTERPRETED",
    "Gpu",
    "Launch",
    "current_device",
    "gpu",
    "launch",
    "planning_for",
    "recording",
    "require_gpu",
    "tl",
    "triton",
]

INTERPRETED: bool = triton.knobs.runtime.interpret


class Gpu(NamedTuple):
    """What the choice of tiles and grids depends on."""

    architecture: str  # "sm_90" for compute capability 9.0 and its like, "gfx942", or "interpreter"
    multiprocessors: int


_planned: Gpu | None = None


def gpu(device: torch.device) -> Gpu:
    """Return the properties of a tensor's device; inside :func:`planning_for` those of the planned GPU."""
    return _planned or _properties(device)


@lru_cache
def _properties(device: torch.device) -> Gpu:
    if device.type != "cuda":
        # Few multiprocessors, so that small tests meet rectangles of several tiles and several rectangles.
        return Gpu("interpreter", 4)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Gpu(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Gpu(f"sm_{properties.major}0", properties.multi_processor_count)


@contextmanager
def planning_for(architecture: str, multiprocessors: int) -> Iterator[None]:
    """Make the launchers choose tiles and grids for another GPU, whatever device holds the tensors."""
    global _planned
    kept, _planned = _planned, Gpu(architecture, multiprocessors)
    try:
        yield
    finally:
        _planned = kept


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]  # compile-time constants, num_warps and num_stages

    def run(self) -> None:
        """Start the kernel on the current device."""
        self.kernel[self.grid](*self.arguments, **self.constants)

    def compile(self) -> Any:
        """Return the kernel compiled for the active driver's target, without starting it."""
        return self.kernel.run(*self.arguments, grid=self.grid, warmup=True, **self.constants)


class _Recorder(NamedTuple):
    launches: list[Launch]
    execute: bool
    keep_arguments: bool


_recorder: _Recorder | None = None


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any) -> None:
    """Start ``kernel`` on ``grid`` programs, on its tensors' device. Every launch passes through here.

    ``constants`` are the compile-time constants, num_warps and num_stages.
    """
    this = Launch(kernel, grid, arguments, constants)
    if _recorder is not None:
        _recorder.launches.append(this if _recorder.keep_arguments else this._replace(arguments=()))
        if not _recorder.execute:
            return
    with current_device(next(x for x in arguments if isinstance(x, Tensor))):
        this.run()


def current_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's GPU the current device, because Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@contextmanager
def recording(*, execute: bool = True, keep_arguments: bool = False) -> Iterator[list[Launch]]:
    """Record every launch made inside, in order.

    Args:
        execute: also start the kernels. Without it the launchers accept tensors on any device, even those that
            hold no data, and leave their results uninitialised.
        keep_arguments: keep the launches' arguments, and with them the memory of all scratch, alive.
    """
    global _recorder
    kept, _recorder = _recorder, _Recorder([], execute, keep_arguments)
    try:
        yield _recorder.launches
    finally:
        _recorder = kept


def require_gpu(tensor: Tensor, instead: str) -> None:
    """Refuse a tensor that Triton can't reach; ``instead`` names the implementation that can.

    Raises:
        ValueError: for a CPU tensor outside the interpreter.
    """
    starts = _recorder is None or _recorder.execute
    if starts and not (tensor.is_cuda or INTERPRETED):
        raise ValueError(
            f"impl 'triton' needs a GPU but the tensors are on {tensor.device}; use impl={instead!r} "
            "(or set TRITON_INTERPRET=1 before the start to run the kernels in Triton's interpreter)"
        )
