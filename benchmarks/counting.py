"""Counters of what is executed without a GPU: work of interpreted kernels, torch's traffic, and allocated memory.

:func:`counting` watches Triton's interpreter, the others watch torch's dispatcher. All are exact: the same numbers
at every run and on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter


@dataclass
class Work:
    """Counts of what interpreted kernels did. ``flops`` are those of products; ``operations`` are elementwise.

    Bytes are those with their masks on; an atomic addition loads its word and stores it.
    """

    launches: int = 0
    flops: int = 0
    operations: int = 0
    exponentials: int = 0
    loaded: int = 0
    stored: int = 0
    atomics: int = 0  # additions to single words


@contextmanager
def counting() -> Iterator[Work]:
    """Count what interpreted kernels do inside the block."""
    work = Work()

    def create_dot(dot: Any, self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        work.flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, d, *options)

    def elementwise(original: Any, self: Any, *arguments: Any) -> Any:
        *operands, op = arguments
        out = original(self, *arguments)
        if operands[-1].dtype.scalar.is_floating():  # the last: a choice's first is its condition
            if op is np.exp2:
                work.exponentials += out.data.size
            else:
                work.operations += out.data.size
        return out

    def reduce(original: Any, self: Any, inputs: Any) -> Any:
        if inputs[0].dtype.scalar.is_floating():
            work.operations += inputs[0].handle.data.size
        return original(self, inputs)

    def masked_load(load: Any, self: Any, ptrs: Any, mask: Any, *options: Any) -> Any:
        work.loaded += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return load(self, ptrs, mask, *options)

    def masked_store(store: Any, self: Any, ptrs: Any, value: Any, mask: Any, *options: Any) -> Any:
        work.stored += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return store(self, ptrs, value, mask, *options)

    def atomic(original: Any, self: Any, op: Any, ptr: Any, val: Any, mask: Any, *options: Any) -> Any:
        count, size = int(mask.data.sum()), ptr.get_element_ty().primitive_bitwidth // 8
        work.atomics += count
        work.loaded += count * size
        work.stored += count * size
        return original(self, op, ptr, val, mask, *options)

    def run(launch: Any, self: Any, *arguments: Any, **options: Any) -> Any:
        work.launches += 1
        with _disable_current_modes():  # the interpreter copies every tensor, which a GPU does not
            return launch(self, *arguments, **options)

    builder = interpreter.InterpreterBuilder
    wrapped: list[tuple[Any, str, Callable[..., Any]]] = [
        (builder, "create_dot", create_dot),
        *((builder, name, elementwise) for name in ("unary_op", "binary_op", "ternary_op")),
        (interpreter.ReduceOps, "apply_impl", reduce),
        (builder, "create_masked_load", masked_load),
        (builder, "create_masked_store", masked_store),
        (builder, "create_atomic_rmw", atomic),
        (interpreter.InterpretedFunction, "run", run),
    ]
    originals = [getattr(owner, name) for owner, name, _ in wrapped]
    for (owner, name, wrapper), original in zip(wrapped, originals, strict=True):
        setattr(owner, name, _method(wrapper, original))
    try:
        yield work
    finally:
        for (owner, name, _), original in zip(wrapped, originals, strict=True):
            setattr(owner, name, original)


def _method(wrapper: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *arguments, **options: wrapper(original, self, *arguments, **options)


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors made inside the block, at their peak and still alive, without ``inputs``."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.peak = 0
        self._inputs = {t.untyped_storage()._cdata for t in tree_leaves(inputs) if isinstance(t, Tensor)}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def alive(self) -> int:
        return sum(size for reference, size in self._alive.values() if not reference.expired())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._inputs:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, self.alive)
        return out


class Traffic(TorchDispatchMode):
    """Counts the bytes that torch's operations inside the block read and write, each tensor once per operation.

    Views move nothing. What launchers only allocate is not counted: their kernels fill it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if func.namespace == "aten" and not func.is_view and not any(x in name for x in ("view", "empty")):
            read = {key: x for key, x in (kwargs or {}).items() if key != "out"}
            made = name.endswith("_like") or "new_" in name  # these look at a tensor's shape alone
            self.bytes += _bytes(tree_leaves(out)) + (0 if made else _bytes(tree_leaves((args, read))))
        return out


def _bytes(leaves: list[Any]) -> int:
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))
