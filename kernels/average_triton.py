"""Moving average over lists of tensors in one Triton launch, whatever their number and shapes.

    average += weight · (param − average)          and, in the same pass, copy = average

Memory traffic is the cost: read average (4 bytes) and parameter, write average (4) and copy; 14 bytes
per parameter for a float32 parameter and a bfloat16 copy, each element visited once.

One row of a table is one chunk of one tensor: the three addresses, the number of elements, and a
code of the dtypes. A program reads its row and moves its chunk, so tensors of any dtype, size and
alignment share the launch. The table depends on addresses and layouts only: the owner of the averages holds it
in a ``Table``, which builds it at the first call and again when storage moves. The weight is a kernel
argument (or a scalar on the device), never a constant: no recompilation per step, and a captured CUDA
graph stays valid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._tensor_lists import Layout, Layouts, Table, check, check_one_pass, layouts
from ._triton import launch, require_gpu, tl, triton

BLOCK = 2048  # elements of a chunk: 28 KiB of traffic, so the 40 bytes of its row do not count
NUM_WARPS = 8  # 40 registers a thread: a multiprocessor holds six programs

# Columns of the table after the average's address.
_PARAM, _COPY, _ELEMENTS, _CODE, _COLUMNS = map(tl.constexpr, range(1, 6))
# The code: dtype of the parameter, dtype of the copy in the next two bits, and a flag for a whole chunk at
# 16-byte aligned addresses, which is moved without masks in wide words.
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_COPY = 3
_WHOLE = tl.constexpr(16)


@triton.jit
def _load(address, code, offs, mask, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Load elements of a parameter of the dtype that ``code`` names, as float32."""
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
    mask = offs < tl.load(row + _ELEMENTS)
    address = tl.load(row)
    average = _load_as(address, tl.float32, offs, mask, WHOLE)
    x = _load(tl.load(row + _PARAM), code & 3, offs, mask, WHOLE, BLOCK)
    # torch.lerp's two forms: exact at weight 0 and at weight 1.
    gap = x - average
    average = tl.where(weight < 0.5, average + weight * gap, x - (1.0 - weight) * gap)
    _store_as(address, tl.float32, average, offs, mask, WHOLE)
    copy = tl.load(row + _COPY)
    copy_code = (code >> 2) & 3
    if copy_code == 0:
        _store_as(copy, tl.float32, average, offs, mask, WHOLE)
    elif copy_code == 1:
        _store_as(copy, tl.bfloat16, average, offs, mask, WHOLE)
    elif copy_code == 2:
        _store_as(copy, tl.float16, average, offs, mask, WHOLE)


@triton.jit
def average_kernel(
    table_ptr,  # int64 [chunks, 5]: average, param, copy, elements, code
    weight,  # float32, or a pointer to one
    ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = table_ptr + tl.program_id(0).to(tl.int64) * _COLUMNS
    if ON_DEVICE:
        weight = tl.load(weight).to(tl.float32)
    code = tl.load(row + _CODE).to(tl.int32)
    if code >= _WHOLE:
        _move(row, weight, code, True, BLOCK)
    else:
        _move(row, weight, code, False, BLOCK)


@torch.no_grad()
def average_(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    weight: float | Tensor,
    copies: Sequence[Tensor | None] | None = None,
    table: Table | None = None,
) -> None:
    """Move ``averages`` in place; see ``tracer.ops.average_``.

    All tensors on one device; each average dense, its parameter and copy with the same strides.

    Raises:
        ValueError: lists that the kernel cannot move, or a CUDA graph is being captured and ``table`` has not
            seen these tensors: building a table copies from the host, which no graph can repeat.
    """
    if averages:
        require_gpu(averages[0], instead="foreach")
    table = table or Table()
    lists = layouts(averages, params, copies)
    capturing = bool(averages) and _capturing(averages[0])
    if capturing and not table.holds(lists, _rows):
        raise ValueError(
            "average_ is being captured in a CUDA graph without a table: "
            "pass table=AverageTable() and call once with it and these tensors before the capture"
        )
    rows = table.rows(lists, _rows)
    if rows is None:
        return
    if capturing:
        table.keep()
    launch(
        average_kernel,
        (rows.shape[0],),
        (rows, weight),
        ON_DEVICE=isinstance(weight, Tensor),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def plan(
    averages: Sequence[Tensor], params: Sequence[Tensor], copies: Sequence[Tensor | None] | None = None
) -> Tensor | None:
    """Return the table that a launch over these lists reads, a row for each chunk of a tensor.

    Returns:
        int64 [chunks, 5] on the tensors' device: addresses of the average, the parameter and the copy (0
        for none), number of elements, code of the dtypes. None where the lists hold no element.

    Raises:
        ValueError: lists that the kernel cannot move; see ``_tensor_lists.py``.
    """
    return _rows(layouts(averages, params, copies))


def bytes_moved(table: Tensor) -> int:
    """Return how many bytes a launch with the table of :func:`plan` reads and writes, the table included."""
    elements, code = table[:, _ELEMENTS.value].cpu(), table[:, _CODE.value].cpu()
    sizes = torch.zeros(
        4, dtype=torch.int64
    )  # bytes of an element by dtype code; none where there is no copy
    for dtype, number in _DTYPE_CODES.items():
        sizes[number] = dtype.itemsize
    each = 2 * torch.float32.itemsize + sizes[code & 3] + sizes[code >> 2 & 3]
    return int((elements * each).sum()) + table.nbytes


def _rows(lists: Layouts) -> Tensor | None:
    check(lists)
    check_one_pass(lists)
    rows = [_chunks(*lists.row(i)) for i, average in enumerate(lists.averages) if average.shape.numel()]
    return torch.cat(rows).to(lists.averages[0].device) if rows else None


def _chunks(average: Layout, param: Layout, copy: Layout | None) -> Tensor:
    """Return the rows of one tensor."""
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
    return torch.stack([*addresses, count, code + _WHOLE.value * whole], 1)
