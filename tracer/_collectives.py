"""Exchanges of rows between the ranks of a group, in functional collectives, which compilers and counters see.

Sizes are the number of rows of each rank of the group, in rank order; a group of one exchanges nothing. Results
may still be under way: the first operation that reads them waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor

from tracer._mesh import Mesh

# The older name, deprecated where the newer one is.
_all_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor


def gather(x: Tensor, sizes: Sequence[int], group: str) -> Tensor:
    """Return the rows [sizes[rank], …] of all ranks, one below the other."""
    if len(sizes) == 1:
        return x
    longest = max(sizes)
    if min(sizes) == longest:
        return _all_gather(x.contiguous(), 0, group)
    # gloo gathers equal parts alone
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    parts = _all_gather(padded, 0, group).split(longest)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def to_owners(x: Tensor, sizes: Sequence[int], own: int, group: str) -> Tensor:
    """Send each rank the part of ``x`` [Σ sizes, …] that it owns; return what all ranks have for this one's rows.

    ``own`` is the place of this rank in the group; the result is [ranks, sizes[own], …], in rank order.
    """
    if len(sizes) == 1:
        return x[None]
    received = functional.all_to_all_single(x.contiguous(), [sizes[own]] * len(sizes), list(sizes), group)
    return received.view(len(sizes), sizes[own], *x.shape[1:])


def pass_on(x: Tensor, receive: int, mesh: Mesh) -> Tensor:
    """Send ``x`` to the rank before this one in a ring; return ``receive`` rows from the rank after it."""
    send_sizes, receive_sizes = [0] * mesh.size, [0] * mesh.size
    send_sizes[(mesh.rank - 1) % mesh.size] = len(x)
    receive_sizes[(mesh.rank + 1) % mesh.size] = receive
    return functional.all_to_all_single(x.contiguous(), receive_sizes, send_sizes, mesh.everyone)


def arrived(x: Tensor) -> Tensor:
    """Wait for a result that may be under way."""
    return x.wait() if isinstance(x, functional.AsyncCollectiveTensor) else x
