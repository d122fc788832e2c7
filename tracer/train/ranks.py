"""The ranks of a run: joining them, doing a piece of work once, and ending with one message.

They agree through the key-value store that starts the process group, not through collectives: a rank may check
pictures for an hour while the others wait, and a rank that has failed cannot take part in a collective.
"""

from __future__ import annotations

import io
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tracer._mesh import MeshShape
from tracer.errors import Refused, Stopped, UserError
from tracer.train.start import check_network, refused_by_the_network
from tracer.train.watch import Watch
from tracer.words import counted

T = TypeVar("T")

WAIT = 0.05  # seconds between two looks at a key that is not there yet


class Ranks:
    """This process among the processes of a run.

    Args:
        rank, size: number of this process, and how many there are.
        local_rank: its number on its host; it decides the GPU.
        store: what the processes agree through; None for a single one.

    Attributes:
        first: whether this rank alone prints, logs, writes results and evaluates.
        watch: looks after the other ranks within :meth:`watched`.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: Any = None) -> None:
        self.rank, self.size, self.local_rank, self._store = rank, size, local_rank, store
        self.first = rank == 0
        self._calls = self._runs = 0  # every rank makes the same calls in the same order
        self._ended_together = False  # by an error of which all ranks know
        self.watch = Watch(rank, size, local_rank, size, None, 0.0)

    def once(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns on the first rank, which alone does it; it must be plain JSON.

        Raises:
            UserError: the work failed; on the first rank whatever it raised, on the others :class:`Refused`.
        """
        if self.size == 1:
            return work()
        key = self._next_key()
        if not self.first:
            answer = json.loads(self._wait(key))
            if not answer:
                raise Refused
            return answer[0]
        try:
            result = work()
        except BaseException:
            self._ended_together = True
            self._store.set(key, "[]")
            raise
        self._store.set(key, json.dumps([result]))
        return result

    def agree(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns on this rank, once it has succeeded on all of them.

        Raises:
            UserError: the work failed on a rank: there whatever it raised, on the others :class:`Refused`.
        """
        if self.size == 1:
            return work()
        key = self._next_key()
        try:
            result = work()
        except BaseException:
            self._ended_together = True
            self._store.set(f"{key}/verdict", "failed")  # no rank waits for those that have not come so far
            raise
        if self._store.add(f"{key}/done", 1) == self.size:
            self._store.set(f"{key}/verdict", "done")
        if self._wait(f"{key}/verdict") != "done":
            raise Refused
        return result

    def counter(self) -> Callable[[int], int] | None:
        """Return a function that says how many distinct numbers all ranks have told it so far; None for one rank.

        A thread of each rank at a time may call it, and no other rank waits for that.
        """
        if self.size == 1:
            return None
        store = dist.PrefixStore(self._next_key(), self._store.clone())

        def count(number: int) -> int:
            return store.add("all", int(store.add(str(number), 1) == 1))

        return count

    def everyones(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order; every rank must ask, with plain JSON."""
        if self.size == 1:
            return [value]
        key = self._next_key()
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        for other in keys:
            self._wait(other)
        return [json.loads(value) for value in self._store.multi_get(keys)]

    def leaders_first(self, work: Callable[[], T]) -> T:
        """Do ``work`` on every rank, on the first of each host before the others: it may download files.

        Raises:
            UserError: as :meth:`agree`.
        """
        if self.size == 1:
            return work()
        key = f"{self._next_key()}/host of {self.rank - self.local_rank}"

        def in_turn() -> T:
            if self.local_rank and self._wait(key) != "done":
                raise Refused
            try:
                result = work()
            except BaseException:
                self._store.set(key, "failed")
                raise
            self._store.set(key, "done")
            return result

        return self.agree(in_turn)

    @contextmanager
    def watched(self, limit: float) -> Iterator[None]:
        """Watch within the block whether all ranks live; every rank enters and leaves it.

        A rank that is killed, stopped or cut off, or that an error ends by itself, ends all: within seconds or,
        where nothing else tells of it, ``limit`` seconds without a sign of life. One line says which, and why.
        """
        if self.size == 1:
            yield
            return
        self._runs += 1
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or self.size)
        store = dist.PrefixStore(f"watch {self._runs}", self._store.clone())
        self.watch = Watch(self.rank, self.size, self.local_rank, local_size, store, limit)
        self._ended_together = False
        self.watch.start()
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, Stopped) and error.together
            together = self._ended_together or stopped or isinstance(error, Refused)
            self.watch.leave(error, together)
            if isinstance(error, Refused):
                time.sleep(
                    0.5
                )  # the launcher may end all others once one has ended: another has to speak first
            raise
        self.watch.leave()

    def speaks(self) -> bool:
        """Return whether this rank is the first that has a last word to say; the others end without one."""
        if self._store is None:
            return True
        try:
            return self._store.add("last word", 1) == 1
        except Exception:  # the store has gone with the rank that held it, which spoke
            return False

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep what ranks other than the first print and warn of within the block to themselves."""
        with ExitStack() as stack:
            if not self.first:
                stack.enter_context(redirect_stdout(io.StringIO()))
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            yield

    def _next_key(self) -> str:
        self._calls += 1
        return f"call {self._calls}"

    def _wait(self, key: str) -> str:
        while not self._store.check([key]):
            time.sleep(WAIT)
        return self._store.get(key).decode()


_joined: list[Ranks] = []  # the ranks that this process has joined, at most one


def world_size() -> int:
    """Return the number of ranks that the launcher says it has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks() -> Ranks:
    """Return the ranks that this process has joined; a single one before it has joined any."""
    return _joined[0] if _joined else Ranks()


def join(timeout: float) -> Ranks:
    """Join the process group that torchrun, DeepSpeed's launcher or a scheduler describes in the environment.

    Without a launcher the process becomes a group of one. The backend is NCCL on GPUs, of which each rank takes
    the one of its local rank, and gloo on CPUs. A group that has been joined already is returned again.

    Args:
        timeout: seconds that a collective waits for the other ranks.

    Raises:
        UserError: the environment is incomplete, or the ranks cannot be reached.
    """
    if _joined and dist.is_initialized():
        return _joined[0]
    _joined.clear()
    size, rank = world_size(), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if dist.is_initialized():  # by the caller, as tests do
        store = dist.distributed_c10d._get_default_store()
        size, rank = dist.get_world_size(), dist.get_rank()
        _joined.append(Ranks(rank, size, local_rank, dist.PrefixStore("tracer", store) if size > 1 else None))
        return _joined[0]
    gpu = torch.cuda.is_available()
    if gpu:
        _take_gpu(local_rank)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    backend, patience = "nccl" if gpu else "gloo", timedelta(seconds=timeout)
    if size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=patience)
        _joined.append(Ranks())
        return _joined[0]
    if local_size := os.environ.get("LOCAL_SIZE"):  # DeepSpeed's name for it
        os.environ.setdefault("LOCAL_WORLD_SIZE", local_size)
    check_network()
    try:
        dist.init_process_group(backend, timeout=patience)  # reads RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
    except (ValueError, RuntimeError, dist.DistNetworkError) as error:
        raise refused_by_the_network(error, rank, size) from error
    store = dist.PrefixStore("tracer", dist.distributed_c10d._get_default_store())
    _joined.append(Ranks(rank, size, local_rank, store))
    return _joined[0]


def _take_gpu(local_rank: int) -> None:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU: this host has {count}, start at most so many ranks on it"
        )
    torch.cuda.set_device(local_rank)


def check_batch_size(batch_size: int, size: int) -> None:
    """Refuse a batch that the ranks cannot share equally.

    Raises:
        UserError: names the two batch sizes next to it that would do.
    """
    if batch_size % size:
        lower, upper = batch_size // size * size, -(-batch_size // size) * size
        near = f"{lower} or {upper}" if lower else str(upper)
        raise UserError(
            f"--batch_size {batch_size} is the number of pairs on all ranks together and cannot be shared by "
            f"{size} ranks equally: give {near}, or start another number of ranks"
        )


def check_mesh(mesh: MeshShape, size: int) -> None:
    """Refuse a mesh that is not one of so many ranks.

    Raises:
        UserError: names the numbers that do not fit.
    """
    if isinstance(mesh, tuple) and mesh[0] * mesh[1] != size:
        raise UserError(
            f"--mesh {mesh[0]}x{mesh[1]} has {counted(mesh[0] * mesh[1], 'place')}, and the run has "
            f"{counted(size, 'rank')}: give two numbers whose product is {size}, auto or ring"
        )
