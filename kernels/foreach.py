"""Moving average over lists of tensors in torch operations: the CPU path, and the checks of both.

    average += weight · (param − average)          one list of float32 averages, one of parameters

``torch._foreach_lerp_`` does it in one call where everything is float32 and no copies are wanted.
Low-precision parameters and copies go through cache-sized pieces, small tensors apart: the float32
piece of a bfloat16 parameter, and the average that is to be copied, are still in the cache when used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of a piece: 4 MiB of float32, small enough for a shared cache, large enough for all cores.
_PIECE = 1 << 20
_SMALL = 1 << 15  # below, a call of its own costs more than the cache saves
_PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Layout(NamedTuple):
    """Where a tensor lies, without the tensor: what the checks and the tables depend on."""

    pointer: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


Layouts = tuple[tuple["Layout | None", ...], ...]


def layouts(
    averages: Sequence[Tensor], params: Sequence[Tensor], copies: Sequence[Tensor | None] | None
) -> Layouts:
    """Layouts of the lists; equal as long as no tensor has moved, so a key for what is built from them."""
    return tuple(
        tuple(None if t is None else Layout(t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in ts)
        for ts in (averages, params, copies or ())
    )


@lru_cache(maxsize=8)
def check(lists: Layouts) -> None:
    """Refuse what can't be averaged.

    Raises:
        ValueError: lists of different lengths or shapes, averages that aren't float32, parameters or
            copies of another dtype than float32, bfloat16, float16, or tensors written here that
            share memory with any other. The message names the list and the position.
    """
    averages, params, copies = lists
    for name, other in (("params", params), ("copies", copies)):
        if other and len(other) != len(averages):
            raise ValueError(
                f"{len(averages)} averages, {len(other)} {name}: the lists must match one to one"
            )
    if len(params) != len(averages):
        raise ValueError(f"{len(averages)} averages, no params: the lists must match one to one")
    for name, other in (("averages", averages), ("params", params), ("copies", copies)):
        for i, (mine, average) in enumerate(zip(other, averages, strict=False)):
            if mine is None or average is None:
                continue
            allowed = (torch.float32,) if name == "averages" else _PARAM_DTYPES
            if mine.dtype not in allowed:
                raise ValueError(
                    f"{name}[{i}] is {mine.dtype}: {' or '.join(map(str, allowed))} is what can be averaged"
                )
            if mine.shape != average.shape:
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(mine.shape)}, averages[{i}] has {tuple(average.shape)}"
                )
            if name == "params" and mine.device != average.device:
                raise ValueError(f"params[{i}] is on {mine.device}, averages[{i}] on {average.device}")
    _check_memory(lists)


def _check_memory(lists: Layouts) -> None:
    spans = []
    for name, tensors in zip(("averages", "params", "copies"), lists, strict=True):
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


def dense(layout: Layout) -> bool:
    """Whether the tensor fills one block of memory, in whatever order of its dimensions."""
    if layout.shape.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(layout.stride, layout.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_order(a: Layout, b: Layout) -> bool:
    """Whether two tensors of one shape have their elements in the same order in memory."""
    if a.shape.numel() == 0:
        return True
    return all(s == t for n, s, t in zip(a.shape, a.stride, b.stride, strict=True) if n != 1)


@torch.no_grad()
def average_(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    weight: float,
    copies: Sequence[Tensor | None] | None = None,
) -> None:
    """Move ``averages`` in place; see ``tracer.ops.average_``. Copies may be on another device."""
    lists = layouts(averages, params, copies)
    check(lists)
    if not averages:
        return
    if copies is None and all(p.dtype is torch.float32 for p in params):
        torch._foreach_lerp_(list(averages), list(params), weight)
        return
    large = [i for i in range(len(averages)) if averages[i].numel() > _SMALL and _common_order(lists, i)]
    small = sorted(set(range(len(averages))) - set(large))
    if small:
        torch._foreach_lerp_([averages[i] for i in small], [params[i].float() for i in small], weight)
    if pairs := [(copy, averages[i]) for i in small if copies and (copy := copies[i]) is not None]:
        torch._foreach_copy_([copy for copy, _ in pairs], [average for _, average in pairs])
    scratch = averages[0].new_empty(_PIECE if large else 0)
    for i in large:
        for average, param, copy in _pieces(averages[i], params[i], copies[i] if copies else None):
            if param.dtype is not torch.float32:
                param = scratch[: param.numel()].copy_(param)
            average.lerp_(param, weight)
            if copy is not None:
                copy.copy_(average)


def _common_order(lists: Layouts, i: int) -> bool:
    """Whether the i-th average, parameter and copy are blocks of memory with the same order of elements."""
    rows = [layout for tensors in lists for layout in tensors[i : i + 1] if layout is not None]
    return dense(rows[0]) and all(same_order(rows[0], row) for row in rows)


def _pieces(
    average: Tensor, param: Tensor, copy: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The same elements of the three, flat, a cache-sized piece at a time."""
    size = average.numel()
    average, param = average.as_strided((size,), (1,)), param.as_strided((size,), (1,))
    copy = None if copy is None else copy.as_strided((size,), (1,))
    for start in range(0, size, _PIECE):
        stop = min(start + _PIECE, size)
        yield average[start:stop], param[start:stop], None if copy is None else copy[start:stop]
