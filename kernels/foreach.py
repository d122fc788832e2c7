"""Moving average over lists of tensors in torch operations: the CPU path, and the checks of both.

    average += weight · (param − average)          one list of float32 averages, one of parameters

``torch._foreach_lerp_`` does it in one call where everything is float32 and no copies are wanted.
Low-precision parameters or copies go through cache-sized pieces: the float32 piece of a bfloat16
parameter, and the average that is to be copied, are still in the cache when they are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of a piece: float32 average and scratch, 512 KiB together, fit a core's second-level cache.
_PIECE = 65536
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
    for average, param, copy in _pieces(averages, params, copies or [None] * len(averages), lists):
        average.lerp_(param.float(), weight)
        if copy is not None:
            copy.copy_(average)


def _pieces(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    lists: Layouts,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The same elements of average, parameter and copy, a cache-sized piece at a time."""
    for i, triple in enumerate(zip(averages, params, copies, strict=True)):
        rows = [layout for tensors in lists for layout in tensors[i : i + 1] if layout is not None]
        flat = dense(rows[0]) and all(same_order(rows[0], row) for row in rows)
        if not flat or triple[0].device.type != "cpu" or triple[0].numel() <= _PIECE:
            yield triple
            continue
        size = (triple[0].numel(),)
        pieces = (
            [None] * -(-size[0] // _PIECE) if t is None else t.as_strided(size, (1,)).split(_PIECE)
            for t in triple
        )
        yield from zip(*pieces, strict=True)
