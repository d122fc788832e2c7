"""Moving average over lists of tensors in torch operations, for the CPU and any other device.

    average += weight · (param − average)          one list of float32 averages, one of parameters

``torch._foreach_lerp_`` does it in one call where everything is float32 and no copies are wanted.
Low-precision parameters and copies go through cache-sized pieces, small tensors apart: the float32
piece of a bfloat16 parameter, and the average that is to be copied, are still in the cache when used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._tensor_lists import Table, check, layouts, one_order

# Elements of a piece: 4 MiB of float32, small enough for a shared cache, large enough for all cores.
PIECE = 1 << 20
_SMALL = 1 << 15  # below, a call of its own costs more than the cache saves


@torch.no_grad()
def average_(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    weight: float,
    copies: Sequence[Tensor | None] | None = None,
    table: Table | None = None,
) -> None:
    """Move ``averages`` in place; see ``tracer.ops.average_``. Copies may be on another device."""
    lists = layouts(averages, params, copies)
    (table or Table()).rows(lists, check)
    if not averages:
        return
    if copies is None and all(p.dtype is torch.float32 for p in params):
        torch._foreach_lerp_(list(averages), list(params), weight)
        return
    large = [i for i in range(len(averages)) if averages[i].numel() > _SMALL and one_order(lists, i)]
    small = sorted(set(range(len(averages))) - set(large))
    if small:
        torch._foreach_lerp_([averages[i] for i in small], [params[i].float() for i in small], weight)
    if pairs := [(copy, averages[i]) for i in small if copies and (copy := copies[i]) is not None]:
        torch._foreach_copy_([copy for copy, _ in pairs], [average for _, average in pairs])
    scratch = averages[0].new_empty(PIECE if large else 0)
    for i in large:
        for average, param, copy in _pieces(averages[i], params[i], copies[i] if copies else None):
            if param.dtype is not torch.float32:
                param = scratch[: param.numel()].copy_(param)
            average.lerp_(param, weight)
            if copy is not None:
                copy.copy_(average)


def _pieces(
    average: Tensor, param: Tensor, copy: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield the same elements of the three, flat, a cache-sized piece at a time."""
    size = average.numel()
    average, param = average.as_strided((size,), (1,)), param.as_strided((size,), (1,))
    copy = None if copy is None else copy.as_strided((size,), (1,))
    for start in range(0, size, PIECE):
        stop = min(start + PIECE, size)
        yield average[start:stop], param[start:stop], None if copy is None else copy[start:stop]
