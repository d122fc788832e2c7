"""A world that is not there: one process stands for a rank of many, with tensors that have shapes and no numbers.

The loop, the engine and the loss of a real run work in it, up to three places that look at numbers. What these
find is given here: no gradient is infinite, all ranks hold batches of one size, and each host has so many ranks.
Whatever else reads a number gets 1, or true.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tracer import _agreement, _mesh
from tracer.kernels import _tensor_lists
from tracer.train import ranks as joined
from tracer.train.ranks import Ranks


def number_of(_: Any, scalar: Tensor) -> bool | float | int:
    """Return the number that code finds in a tensor without any."""
    if scalar.dtype is torch.bool:
        return True
    return 1.0 if scalar.is_floating_point() else 0


@contextmanager
def fake_ranks(size: int, ranks_per_host: int) -> Iterator[None]:
    """Make this process rank 0 of ``size`` within the block; what it sends goes nowhere.

    A group of one that this process has joined before is given up.

    Raises:
        RuntimeError: this process is one of several real ranks.
    """
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            raise RuntimeError("this process is one of several ranks: a dry run starts without a launcher")
        dist.destroy_process_group()
    from deepspeed.comm import comm
    from deepspeed.utils import groups
    from torch.testing._internal.distributed.fake_pg import FakeStore

    importlib.reload(groups)  # where DeepSpeed keeps the groups that it has made
    comm.cdb = None
    kept = {name: os.environ.get(name) for name in ("LOCAL_RANK", "DS_ACCELERATOR")}
    os.environ.update(LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    joined._joined[:] = [Ranks(0, size)]
    try:
        with ExitStack() as stack:
            for owner, name, value in _replacements(size, ranks_per_host):
                stack.enter_context(replaced(owner, name, value))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            warnings.filterwarnings("ignore", message=".*is deprecated.*", category=FutureWarning)
            yield
    finally:
        joined._joined.clear()
        dist.destroy_process_group()
        importlib.reload(groups)
        comm.cdb = None
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _replacements(size: int, ranks_per_host: int) -> list[tuple[Any, str, Any]]:
    """Return what reads numbers or addresses, and what stands for it."""
    from deepspeed.runtime.zero import partitioned_param_coordinator, stage3, stage_1_and_2

    def finite(*_: Any) -> bool:
        return False

    return [
        (_agreement, "_exchange", _exchange),
        (_mesh, "_default_shape_of", lambda _: _mesh.default_shape(size, ranks_per_host)),
        (_tensor_lists, "_check_memory", lambda _: None),  # compares addresses
        *((nn.Module, name, _itself) for name in ("to", "bfloat16", "half", "float")),
        *((module, "is_invalid_grad_norm", finite) for module in (stage_1_and_2, stage3)),
        (partitioned_param_coordinator, "assert_ints_same_as_other_ranks", _same_everywhere),
    ]


def _exchange(mine: Sequence[int], group: Any) -> list[list[int]]:
    """Send as :func:`tracer._agreement.agree` does, and find that all ranks say the same."""
    size = dist.get_world_size(group)
    table = torch.empty((size, len(mine)), dtype=torch.int64)
    dist.all_gather(list(table.unbind()), torch.empty(len(mine), dtype=torch.int64), group=group)
    return [list(mine)] * size


def _same_everywhere(ints: list[int]) -> None:
    """Send as DeepSpeed's check of the layers' order at stage 3 does, and find no difference."""
    for sent in (len(ints), ints):
        dist.broadcast(torch.tensor(sent), src=0)


def _itself(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
    """Return the module as it is: such parameters cannot be converted, and :func:`cast` has made others."""
    return module


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the floating-point parameters and buffers by others of ``dtype``, as DeepSpeed converts a model."""
    made: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_floating_point():
                new = made.setdefault(id(p), nn.Parameter(p.detach().to(dtype), p.requires_grad))
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let ``value`` stand for an attribute of ``owner`` within the block."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


@contextmanager
def wrapped(owner: Any, name: str, around: Callable[[], Any]) -> Iterator[None]:
    """Enter ``around()`` at each call of a function of ``owner`` within the block."""
    function = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with around():
            return function(*args, **kwargs)

    is_static = isinstance(owner, type) and isinstance(owner.__dict__.get(name), staticmethod)
    with replaced(owner, name, staticmethod(call) if is_static else call):
        yield


@contextmanager
def without_log() -> Iterator[None]:
    """Keep what libraries log within the block to themselves."""
    kept = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(kept)
