"""The lists of tensors that a moving average takes: their layouts in memory, and every check of them.

A layout stands for a tensor without holding it, so checks and tables that depend on layouts alone are kept, by a
:class:`Table` of their owner, for the next call with the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Layout(NamedTuple):
    """Where a tensor lies: all that the checks and the kernel's table depend on."""

    pointer: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Layouts(NamedTuple):
    """Layouts of the three lists; ``copies`` is empty where no average has a copy."""

    averages: tuple[Layout, ...]
    params: tuple[Layout, ...]
    copies: tuple[Layout | None, ...]

    def row(self, i: int) -> tuple[Layout, Layout, Layout | None]:
        """Return the i-th average, parameter and copy."""
        return self.averages[i], self.params[i], self.copies[i] if self.copies else None


def layouts(
    averages: Sequence[Tensor], params: Sequence[Tensor], copies: Sequence[Tensor | None] | None
) -> Layouts:
    """Return the layouts of the lists; they are equal until a tensor moves."""
    return Layouts(
        tuple(map(_layout, averages)),
        tuple(map(_layout, params)),
        tuple(None if t is None else _layout(t) for t in copies or ()),
    )


def _layout(tensor: Tensor) -> Layout:
    return Layout(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


class Table:
    """Holds what one owner of averages needs again at its next call: checked lists, and a kernel's table of them.

    A table belongs to one set of lists. It is built at the first call, and again when a tensor moves in memory.
    What a CUDA graph has captured is kept as long as the owner keeps this object, because a replay reads it.
    """

    def __init__(self) -> None:
        self._key: tuple[Layouts, Callable[[Layouts], Tensor | None]] | None = None
        self._rows: Tensor | None = None
        self._captured: list[Tensor] = []

    def holds(self, lists: Layouts, build: Callable[[Layouts], Tensor | None]) -> bool:
        """Return whether :meth:`rows` has nothing to build."""
        return self._key == (lists, build)

    def rows(self, lists: Layouts, build: Callable[[Layouts], Tensor | None]) -> Tensor | None:
        """Return ``build(lists)``, from the last call where the lists are equal; ``build`` refuses bad lists."""
        if not self.holds(lists, build):
            self._rows = build(lists)
            self._key = lists, build
        return self._rows

    def keep(self) -> None:
        """Keep the present rows for good: a CUDA graph reads them."""
        if self._rows is not None and not any(self._rows is x for x in self._captured):
            self._captured.append(self._rows)


def check(lists: Layouts) -> None:
    """Refuse lists that cannot be averaged.

    Raises:
        ValueError: lists of different lengths or shapes, averages that aren't float32, parameters or
            copies of another dtype than float32, bfloat16, float16, or tensors written here that
            share memory with any other. The message names the list and the position.
    """
    averages = lists.averages
    for name, tensors in (("params", lists.params), ("copies", lists.copies)):
        if len(tensors) != len(averages) and (tensors or name == "params"):
            raise ValueError(
                f"{len(averages)} averages, {len(tensors) or 'no'} {name}: the lists must match one to one"
            )
    for name, tensors in zip(lists._fields, lists, strict=True):
        for i, (tensor, average) in enumerate(zip(tensors, averages, strict=False)):
            if tensor is not None:
                _check_tensor(name, i, tensor, average)
    _check_memory(lists)


def _check_tensor(name: str, i: int, tensor: Layout, average: Layout) -> None:
    allowed = (torch.float32,) if name == "averages" else _PARAM_DTYPES
    if tensor.dtype not in allowed:
        raise ValueError(
            f"{name}[{i}] is {tensor.dtype}: {' or '.join(map(str, allowed))} is what can be averaged"
        )
    if tensor.shape != average.shape:
        raise ValueError(
            f"{name}[{i}] has shape {tuple(tensor.shape)}, averages[{i}] has {tuple(average.shape)}"
        )
    if name == "params" and tensor.device != average.device:
        raise ValueError(f"params[{i}] is on {tensor.device}, averages[{i}] on {average.device}")


def _check_memory(lists: Layouts) -> None:
    spans = []
    for name, tensors in zip(lists._fields, lists, strict=True):
        for i, t in enumerate(tensors):
            if t is not None and t.shape.numel():
                extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride, strict=True))
                end = t.pointer + extent * t.dtype.itemsize
                spans.append((str(t.device), t.pointer, end, name != "params", f"{name}[{i}]"))
    # Sweep by address: a span may not begin before the end of an earlier one, unless both are read only.
    device, ends = "", {True: (0, ""), False: (0, "")}
    for where, start, end, written, label in sorted(spans):
        if where != device:
            device, ends = where, {True: (0, ""), False: (0, "")}
        for other in (True, False):
            if (written or other) and start < ends[other][0]:
                raise ValueError(
                    f"{label} and {ends[other][1]} share memory: an average and its copy need storage of their own"
                )
        ends[written] = max(ends[written], (end, label))


def check_one_pass(lists: Layouts) -> None:
    """Refuse lists whose elements one pass over flat memory cannot move; call :func:`check` before.

    Raises:
        ValueError: tensors on several devices, an average that is not dense, or one whose parameter or copy
            has its elements in another order.
    """
    for i in range(len(lists.averages)):
        average, param, copy = lists.row(i)
        if average.device != lists.averages[0].device:
            raise ValueError(
                f"averages[{i}] is on {average.device}, averages[0] on {lists.averages[0].device}: "
                "one device a call"
            )
        if copy is not None and copy.device != average.device:
            raise ValueError(f"copies[{i}] is on {copy.device}, averages[{i}] on {average.device}")
        if not _dense(average):
            raise ValueError(
                f"averages[{i}] isn't dense (shape {tuple(average.shape)}, strides {average.stride}): "
                "make it contiguous, or use impl='foreach'"
            )
        for name, other in (("params", param), ("copies", copy)):
            if other is not None and not _same_order(average, other):
                raise ValueError(
                    f"{name}[{i}] has strides {other.stride}, averages[{i}] has {average.stride}: "
                    "give them the same memory format, or use impl='foreach'"
                )


def one_order(lists: Layouts, i: int) -> bool:
    """Return whether the i-th average, parameter and copy are dense, with their elements in the same order."""
    average, param, copy = lists.row(i)
    return _dense(average) and all(_same_order(average, t) for t in (param, copy) if t is not None)


def _dense(layout: Layout) -> bool:
    """Return whether the tensor fills one block of memory, in whatever order of its dimensions."""
    if layout.shape.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(layout.stride, layout.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_order(a: Layout, b: Layout) -> bool:
    """Return whether two tensors of one shape have their elements in the same order in memory."""
    if a.shape.numel() == 0:
        return True
    return all(s == t for n, s, t in zip(a.shape, a.stride, b.stride, strict=True) if n != 1)
