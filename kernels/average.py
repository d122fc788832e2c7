"""Moving average over lists of tensors in one Triton launch, whatever their number and shapes.

    average += weight · (param − average)          and, in the same pass, copy = average

Memory traffic is the cost: read average (4 bytes) and parameter, write average (4) and copy; 14 bytes
per parameter for a float32 parameter and a bfloat16 copy, each element visited once.

One row of a table is one chunk of one tensor: the three addresses, the number of elements, and a
code of the dtypes. A program reads its row and moves its chunk, so tensors of any dtype, size and
alignment share the launch. The table depends on addresses and layouts only: it is built at the first
call, kept, and rebuilt when storage moves. The weight is a kernel argument (or a scalar on the
device), never a constant: no recompilation per step, and a captured CUDA graph stays valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ._triton import INTERPRETED, device_guard, tl, triton
from .foreach import Layout, Layouts, check, dense, layouts, same_order

BLOCK = 2048  # elements of a chunk: 28 KiB of traffic, so the 40 bytes of its row do not count
NUM_WARPS = 8  # 40 registers a thread: a multiprocessor holds six programs
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_COPY = 3
_WHOLE = 16  # flag: a whole chunk at 16-byte aligned addresses, moved without masks in wide words


@triton.jit
def _load(address, code, offs, mask, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Elements of a parameter of the dtype ``code`` says, as float32."""
    x = tl.zeros((BLOCK,), tl.float32)
    if code == 0:
        x = _load_as(address, tl.float32, offs, mask, WHOLE)
    elif code == 1:
        x = _load_as(address, tl.bfloat16, offs, mask, WHOLE)
    else:
        x = _load_as(address, tl.float16, offs, mask, WHOLE)
    return x


@triton.jit
def _load_as(address, DTYPE: tl.constexpr, offs, mask, WHOLE: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if WHOLE:
        x = tl.load(tl.multiple_of(pointer, 16) + offs)
    else:
        x = tl.load(pointer + offs, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store_as(address, DTYPE: tl.constexpr, x, offs, mask, WHOLE: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if WHOLE:
        tl.store(tl.multiple_of(pointer, 16) + offs, x.to(DTYPE))
    else:
        tl.store(pointer + offs, x.to(DTYPE), mask=mask)


@triton.jit
def _move(row, weight, code, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < tl.load(row + 3)
    address = tl.load(row)
    average = _load_as(address, tl.float32, offs, mask, WHOLE)
    x = _load(tl.load(row + 1), code & 3, offs, mask, WHOLE, BLOCK)
    # torch.lerp's two forms: exact at weight 0 and at weight 1.
    gap = x - average
    average = tl.where(weight < 0.5, average + weight * gap, x - (1.0 - weight) * gap)
    _store_as(address, tl.float32, average, offs, mask, WHOLE)
    copy = tl.load(row + 2)
    copy_code = (code >> 2) & 3
    if copy_code == 0:
        _store_as(copy, tl.float32, average, offs, mask, WHOLE)
    elif copy_code == 1:
        _store_as(copy, tl.bfloat16, average, offs, mask, WHOLE)
    elif copy_code == 2:
        _store_as(copy, tl.float16, average, offs, mask, WHOLE)


@triton.jit
def _average_kernel(
    table_ptr,  # int64 [chunks, 5]: average, param, copy, elements, code
    weight,  # float32, or a pointer to one
    ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = table_ptr + tl.program_id(0).to(tl.int64) * 5
    if ON_DEVICE:
        weight = tl.load(weight).to(tl.float32)
    code = tl.load(row + 4).to(tl.int32)
    if code >= 16:
        _move(row, weight, code, True, BLOCK)
    else:
        _move(row, weight, code, False, BLOCK)


@torch.no_grad()
def average_(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    weight: float | Tensor,
    copies: Sequence[Tensor | None] | None = None,
) -> None:
    """Move ``averages`` in place; see ``tracer.ops.average_``.

    All tensors on one device; each average dense, its parameter and copy with the same strides.
    Under CUDA graph capture the table must exist: call once before with the same tensors.
    """
    if averages:
        _require_gpu(averages[0])
    table = _table(layouts(averages, params, copies))
    if table is None:
        return
    on_device = isinstance(weight, Tensor)
    with device_guard(averages[0]):
        _average_kernel[(table.shape[0],)](
            table, weight, ON_DEVICE=on_device, BLOCK=BLOCK, num_warps=NUM_WARPS
        )


def _require_gpu(tensor: Tensor) -> None:
    if not (tensor.is_cuda or INTERPRETED):
        raise ValueError(
            f"impl='triton' needs tensors on a GPU, got {tensor.device}: use impl='foreach', or set "
            "TRITON_INTERPRET=1 before the import to run the kernel under Triton's interpreter"
        )


@lru_cache(maxsize=8)
def _table(lists: Layouts) -> Tensor | None:
    """Table of chunks, int64 [chunks, 5] on the tensors' device; None without any element."""
    check(lists)
    averages, params, copies = lists
    rows = []
    device = None
    for i, (average, param) in enumerate(zip(averages, params, strict=True)):
        copy = copies[i] if copies else None
        assert average is not None
        assert param is not None
        _check_layout(i, average, param, copy, averages[0])
        device = average.device
        if average.shape.numel():
            rows.append(_chunks(average, param, copy))
    return torch.cat(rows).to(device) if rows else None


def _chunks(average: Layout, param: Layout, copy: Layout | None) -> Tensor:
    numel = average.shape.numel()
    start = torch.arange(0, numel, BLOCK)
    count = (numel - start).clamp(max=BLOCK)
    code = _DTYPE_CODES[param.dtype] | (_NO_COPY if copy is None else _DTYPE_CODES[copy.dtype]) << 2
    aligned = all(t is None or t.pointer % 16 == 0 for t in (average, param, copy))
    whole = (count == BLOCK) & aligned
    addresses = [
        torch.zeros_like(start) if t is None else t.pointer + start * t.dtype.itemsize
        for t in (average, param, copy)
    ]
    return torch.stack([*addresses, count, code + _WHOLE * whole], 1)


def _check_layout(i: int, average: Layout, param: Layout, copy: Layout | None, first: Layout | None) -> None:
    assert first is not None
    if average.device != first.device:
        raise ValueError(
            f"averages[{i}] is on {average.device}, averages[0] on {first.device}: one device a call"
        )
    if copy is not None and copy.device != average.device:
        raise ValueError(f"copies[{i}] is on {copy.device}, averages[{i}] on {average.device}")
    if not dense(average):
        raise ValueError(
            f"averages[{i}] isn't dense (shape {tuple(average.shape)}, strides {average.stride}): "
            "make it contiguous, or use impl='foreach'"
        )
    for name, other in (("params", param), ("copies", copy)):
        if other is not None and not same_order(average, other):
            raise ValueError(
                f"{name}[{i}] has strides {other.stride}, averages[{i}] has {average.stride}: "
                "give them the same memory format, or use impl='foreach'"
            )
