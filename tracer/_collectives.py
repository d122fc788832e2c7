"""Exchanges of rows between the ranks of a group, in functional collectives, which compilers and counters see.

Sizes are the number of rows of each rank of the group, in rank order; a group of one exchanges nothing. Results
may still be under way: the first operation that reads them waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tracer._mesh import Mesh


def _functional() -> Any:
    """Import the functional collectives, with which torch loads its compiler: only ranks pay for that."""
    import torch.distributed._functional_collectives as functional

    return functional


def _all_gather(x: Tensor, group: str) -> Tensor:
    functional = _functional()
    gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor  # the older name
    return gather(x, 0, group)


def gather(x: Tensor, sizes: Sequence[int], group: str) -> Tensor:
    """Return the rows [sizes[rank], …] of all ranks, one below the other."""
    return end_gather(start_gather(x, sizes, group), sizes)


def start_gather(x: Tensor, sizes: Sequence[int], group: str) -> Tensor:
    """Return the rows of all ranks, under way, each rank's padded to the longest part: gloo gathers equal ones."""
    if len(sizes) == 1:
        return x
    longest = max(sizes)
    if min(sizes) != longest:
        x = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    return _all_gather(x.contiguous(), group)


def end_gather(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the rows that :func:`start_gather` has begun to gather, without padding."""
    if min(sizes) == max(sizes):
        return x
    parts = x.split(max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def to_owners(x: Tensor, sizes: Sequence[int], own: int, group: str) -> Tensor:
    """Send each rank the part of ``x`` [Σ sizes, …] that it owns; return what all ranks have for this one's rows.

    ``own`` is the place of this rank in the group; the result is [ranks, sizes[own], …], in rank order.
    """
    if len(sizes) == 1:
        return x[None]
    received = _functional().all_to_all_single(x.contiguous(), [sizes[own]] * len(sizes), list(sizes), group)
    return received.view(len(sizes), sizes[own], *x.shape[1:])


def pass_on(x: Tensor, receive: int, mesh: Mesh) -> Tensor:
    """Send ``x`` to the rank before this one in a ring; return ``receive`` rows from the rank after it."""
    send_sizes, receive_sizes = [0] * mesh.size, [0] * mesh.size
    send_sizes[(mesh.rank - 1) % mesh.size] = len(x)
    receive_sizes[(mesh.rank + 1) % mesh.size] = receive
    return _functional().all_to_all_single(x.contiguous(), receive_sizes, send_sizes, mesh.everyone)


def arrived(x: Tensor) -> Tensor:
    """Wait for a result that may be under way."""
    return x.wait() if isinstance(x, _functional().AsyncCollectiveTensor) else x
