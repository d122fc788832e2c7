"""What the ranks tell each other before a loss: the sizes of their batches, and whether their calls agree.

A call that differs between ranks would leave some of them waiting for ever in a collective, or compute something
that nobody asked for. So each call begins with one exchange of four numbers a rank. Only where they show that
something is wrong do the ranks send words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tracer._mesh import host_group


class Sizes(NamedTuple):
    """How many images and texts each rank holds, in rank order."""

    images: tuple[int, ...]
    texts: tuple[int, ...]


def agree(
    group: ProcessGroup, images: int, texts: int, call: Mapping[str, object], refusal: Exception | None
) -> Sizes:
    """Return the sizes of all ranks' batches, once it is known that all ranks make the same call.

    Args:
        group: the ranks.
        images, texts: of this rank.
        call: what must be the same on every rank, by the name that the user knows it by.
        refusal: why this rank cannot make the call, or None.

    Raises:
        ValueError: the calls differ, or another rank cannot make its call; every rank raises the same line.
        Exception: ``refusal``, after the others have learnt of it.
    """
    digest = hashlib.sha256(repr(sorted(call.items())).encode()).digest()
    mine = [images, texts, int.from_bytes(digest[:7], "little"), int(refusal is not None)]
    all_images, all_texts, digests, refused = zip(*_exchange(mine, group), strict=True)
    if any(refused) or len(set(digests)) > 1:
        _explain(host_group(group), call, refusal)
    return Sizes(all_images, all_texts)


def _exchange(mine: Sequence[int], group: ProcessGroup) -> list[list[int]]:
    """Return the numbers of all ranks, in rank order."""
    group = host_group(group)
    table = torch.empty((dist.get_world_size(group), len(mine)), dtype=torch.int64)
    dist.all_gather(list(table.unbind()), torch.tensor(mine, dtype=torch.int64), group=group)
    return table.tolist()


def _explain(group: ProcessGroup, call: Mapping[str, object], refusal: Exception | None) -> None:
    """Raise what is wrong, after all ranks have told each other."""
    said: list[tuple[Mapping[str, object], str]] = [({}, "")] * dist.get_world_size(group)
    dist.all_gather_object(said, (call, str(refusal) if refusal else ""), group=group)
    if refusal:
        raise refusal
    for rank, (_, reason) in enumerate(said):
        if reason:
            raise ValueError(f"{reason} (said by rank {rank})")
    for name, value in said[0][0].items():
        for rank, (other, _) in enumerate(said):
            if other.get(name) != value:
                raise ValueError(
                    f"contrastive_loss: {name} is {value} on rank 0 but {other.get(name)} on rank {rank}; "
                    "all ranks of the group must pass the same"
                )
