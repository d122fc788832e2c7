"""What a process keeps in memory and what it sends, counted operation by operation."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

COLLECTIVES = ("c10d", "_c10d_functional")

Operator = Callable[..., Any]


class Group(NamedTuple):
    """The ranks of a collective: how many, and over how many ranks of the run they are spread."""

    ranks: int
    span: int


class Sent(NamedTuple):
    """How often a collective was called, and the bytes that it takes or returns, whichever is more."""

    calls: int
    bytes: int


class Accounts(TorchDispatchMode):
    """Counts, within its block, the memory that operations allocate and what collectives move.

    A storage counts from the operation that returns it until nothing refers to it. Memory that an operation takes
    and gives back within is not seen, unless ``instead`` runs the operation in parts. It works on tensors
    of any kind, those of ``FakeTensorMode`` included.

    Args:
        instead: name of an operator → what runs in its place; its own operations are counted.

    Attributes:
        instead: as given.
        held: bytes in memory now, by kind.
        at_peak: bytes by kind at the moment when most were in memory, since :meth:`restart`.
        flops: floating-point operations of products, convolutions and attention, since :meth:`restart`.
        most: the most bytes of each kind at any moment, since :meth:`restart`.
        sent: (name of the collective, its group) → what it moved, since :meth:`restart`.
    """

    def __init__(self, instead: Mapping[str, Operator] | None = None) -> None:
        super().__init__()
        self.instead = dict(instead or {})
        self._kind = "other"
        self._storages: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self.held: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self.most: Counter[str] = Counter()
        self.sent: dict[tuple[str, Group], Sent] = {}
        self.flops = 0
        self._total = self._peak = 0

    def restart(self) -> None:
        """Begin the peak and the collectives anew; what is in memory stays counted."""
        self._peak, self.at_peak, self.most = self._total, dict(self.held), self.held.copy()
        self.sent, self.flops = {}, 0

    @contextmanager
    def kind(self, kind: str) -> Iterator[None]:
        """Count what is allocated within as this kind."""
        kept, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = kept

    def own(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count these tensors as this kind from now on."""
        for tensor in tensors:
            self._count(tensor, kind, again=True)

    def briefly(self, size: int) -> None:
        """Count so many bytes of the present kind as in memory for this moment alone."""
        self._add(self._kind, size)
        self._add(self._kind, -size)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it returns."""
        given = kwargs or {}
        if func.namespace in COLLECTIVES:
            out = func(*args, **given)
            self._count_collective(func, args, given, out)
        elif (other := self.instead.get(f"{func.namespace}::{func._opname}")) is not None:
            out = other(func, *args, **given)
        else:
            out = func(*args, **given)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **given, out_val=out)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x, self._kind)
        return out

    def _count(self, tensor: Tensor, kind: str, again: bool = False) -> None:
        if tensor.device.type == "meta":  # stands for shapes alone in a real run too
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        if known is not None:
            if again and known[1] != kind:
                self._storages[key] = (known[0], kind, known[2])
                self.held[known[1]] -= known[2]
                self.held[kind] += known[2]
                self.most[kind] = max(self.most[kind], self.held[kind])
            return
        size = storage.nbytes()

        def gone(_: Any, key: int = key) -> None:
            _, kind, size = self._storages.pop(key)
            self._add(kind, -size)

        self._storages[key] = (weakref.ref(storage, gone), kind, size)
        self._add(kind, size)

    def _add(self, kind: str, size: int) -> None:
        self.held[kind] += size
        self._total += size
        self.most[kind] = max(self.most[kind], self.held[kind])
        if self._total > self._peak:
            self._peak, self.at_peak = self._total, {k: n for k, n in self.held.items() if n}

    def _count_collective(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name, group = func._opname, _group_of(args, kwargs)
        if group is None or "barrier" in name:  # waits, and moves nothing
            return
        size = max(_bytes(x) for x in (*args, *kwargs.values(), out))
        key = (name, group)
        before = self.sent.get(key, Sent(0, 0))
        self.sent[key] = Sent(before.calls + 1, before.bytes + size)


def _bytes(values: Any) -> int:
    return sum(x.nbytes for x in tree_leaves(values) if isinstance(x, Tensor))


def _group_of(args: Any, kwargs: Any) -> Group | None:
    """Return the group, an object or a name, that an operator was called with."""
    values = [*args, *kwargs.values()]
    boxes = [x for x in values if isinstance(x, torch.ScriptObject)]
    objects = [dist.ProcessGroup.unbox(x) for x in boxes if str(x._type()).endswith("ProcessGroup")]
    names = [x for x in values if isinstance(x, str)]
    if not objects and not names:
        return None
    resolve: Any = dist.distributed_c10d._resolve_process_group
    group = objects[0] if objects else resolve(names[-1])
    ranks = dist.get_process_group_ranks(group)
    return Group(len(ranks), max(ranks) - min(ranks) + 1)
