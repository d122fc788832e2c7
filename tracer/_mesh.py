"""The ranks of a process group as a mesh: which part of the logit matrix each computes, and with whom it talks.

The ranks form P rows and Q columns, rank = p·Q + q. Rank (p, q) computes the rectangle of the images that the
ranks of mesh row p hold and the texts that the ranks of mesh column q hold, so each pair of the global batch is
computed once. Features are gathered within mesh rows and mesh columns alone.
"""

from __future__ import annotations

import math
import os
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

MeshShape = tuple[int, int] | Literal["ring"] | None


class Mesh(NamedTuple):
    """A mesh as one of its ranks sees it. Groups are called by name, which the compiler can read."""

    rows: int  # P
    cols: int  # Q
    rank: int
    everyone: str  # all ranks
    row: str  # the ranks that compute the same images as this one
    col: str  # those that compute the same texts
    ring: bool = False  # P = R, Q = 1, but texts travel instead of being gathered

    @property
    def size(self) -> int:
        """Return R, the number of ranks."""
        return self.rows * self.cols

    @property
    def row_ranks(self) -> range:
        """Return the ranks of this rank's mesh row, in order."""
        first = self.rank // self.cols * self.cols
        return range(first, first + self.cols)

    @property
    def col_ranks(self) -> range:
        """Return the ranks of this rank's mesh column, in order."""
        return range(self.rank % self.cols, self.size, self.cols)


def default_shape(size: int, ranks_per_host: int) -> tuple[int, int]:
    """Return (P, Q) for so many ranks.

    On several hosts Q is the number of ranks of a host, so that of each text one copy alone reaches a host. On one
    host, and where the ranks of a host are no divisor of all, it is the squarest mesh, which receives least.
    """
    if ranks_per_host < size and size % ranks_per_host == 0:
        return size // ranks_per_host, ranks_per_host
    cols = max(q for q in range(1, math.isqrt(size) + 1) if size % q == 0)
    return size // cols, cols


def check_shape(shape: MeshShape, size: int | None, caller: str = "contrastive_loss") -> MeshShape:
    """Return the shape of the mesh of so many ranks; None: the default, which the ranks find together.

    With ``size`` None nobody knows yet how many ranks there will be.
    """
    if shape is None or shape == "ring":
        return shape
    is_pair = isinstance(shape, (tuple, list)) and len(shape) == 2 and all(isinstance(n, int) for n in shape)
    if not is_pair or min(shape) < 1 or (size is not None and shape[0] * shape[1] != size):
        ranks = "the number of" if size is None else size
        raise ValueError(
            f"{caller}: mesh must be None, 'ring' or (P, Q) with P·Q = {ranks} ranks, got {shape!r}"
        )
    return shape[0], shape[1]


def is_outside(group: object) -> bool:
    """Return whether this is what torch gives to ranks that are not in a group in its place."""
    return isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER


def refuse_no_group(group: object, caller: str = "contrastive_loss") -> None:
    """Raise ValueError for what is neither a process group nor None, nor stands for one elsewhere."""
    if not (group is None or isinstance(group, ProcessGroup) or is_outside(group)):
        raise ValueError(
            f"{caller}: group must be a torch.distributed.ProcessGroup or None, got {group!r}; for all ranks pass "
            "torch.distributed.group.WORLD"
        )


def check_group(group: object) -> ProcessGroup | None:
    """Return the group, or None for a group of one, which needs no communication."""
    refuse_no_group(group)
    if group is None:
        return None
    if not isinstance(group, ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(
            "contrastive_loss: this process is not a rank of group; call it on the group's ranks"
        )
    return group if dist.get_world_size(group) > 1 else None


# Groups of a mesh are made once, by all ranks of the group, at the first call that needs them.
_made: WeakKeyDictionary[ProcessGroup, dict[object, Any]] = WeakKeyDictionary()


def mesh_of(group: ProcessGroup, shape: MeshShape) -> Mesh:
    """Return the mesh of a group's ranks. The first call for a shape makes the groups of its rows and columns."""
    rows, cols, rank, everyone, row, col, ring = _constants(group, shape)
    return Mesh(rows, cols, rank, everyone, row, col, ring)


def _constants(group: ProcessGroup, shape: MeshShape) -> tuple[Any, ...]:
    made = _made.setdefault(group, {})
    if shape not in made:
        made[shape] = _make(group, _default_shape_of(group) if shape is None else shape)
    return tuple(made[shape])


# What torch.compiler.assume_constant_result does, which would load the compiler: it must not trace these groups.
_constants._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _default_shape_of(group: ProcessGroup) -> tuple[int, int]:
    """Return the default shape, the same on all ranks: hosts with different numbers of ranks count as one host."""
    size = dist.get_world_size(group)
    here = torch.tensor([int(os.environ.get("LOCAL_WORLD_SIZE") or size)])
    everyones = [torch.empty_like(here) for _ in range(size)]
    dist.all_gather(everyones, here, group=host_group(group))
    on_hosts = {int(number) for number in everyones}
    return default_shape(size, on_hosts.pop() if len(on_hosts) == 1 else size)


def _make(group: ProcessGroup, shape: tuple[int, int] | Literal["ring"]) -> Mesh:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    rows, cols = (size, 1) if shape == "ring" else shape
    mesh = Mesh(rows, cols, rank, group.group_name, "", "", shape == "ring")
    return mesh._replace(row=_subgroup(group, mesh.row_ranks), col=_subgroup(group, mesh.col_ranks))


def _subgroup(group: ProcessGroup, ranks: range) -> str:
    """Return the name of the group of these ranks of ``group``; nobody talks in a group of one."""
    if len(ranks) == 1:
        return ""
    if len(ranks) == dist.get_world_size(group):
        return group.group_name
    return _new_group(group, ranks, dist.get_backend(group)).group_name


def _new_group(group: ProcessGroup, ranks: range, backend: str) -> ProcessGroup:
    globally = [dist.get_global_rank(group, rank) for rank in ranks]
    made = dist.new_group(
        globally, backend=backend, use_local_synchronization=True, timeout=_timeout_of(group)
    )
    assert isinstance(made, ProcessGroup)  # a rank that is not in the group gets a number
    return made


def _timeout_of(group: ProcessGroup) -> timedelta | None:
    """Return after how long a collective of a group gives up, which torch does not pass on to its subgroups."""
    device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None)


def host_group(group: ProcessGroup) -> ProcessGroup:
    """Return a group of the same ranks that exchanges tensors in host memory, so that no GPU has to wait."""
    if "gloo" in str(dist.get_backend_config(group)):
        return group
    made = _made.setdefault(group, {})
    make = partial(_new_group, group, range(dist.get_world_size(group)), "gloo")
    if "host" not in made:
        made["host"] = make()
    return made["host"]
