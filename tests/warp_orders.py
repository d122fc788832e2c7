"""Triton's interpreter with warps that run apart, so that a missing barrier shows.

The interpreter executes a program one whole-tensor operation after the other, as if a barrier followed each store.
Inside :func:`apart` each program runs once per *slice of lanes*: a slice computes everything, but of a store only
the elements that its lanes own reach memory. A slice runs alone from one barrier to the next, and the slices take
turns in a random order, drawn anew at every barrier. So what a late slice stores is not there before the barrier,
and what an early slice stores overwrites what others have not read yet: the two ways in which warps race on a GPU.
The programs of a launch take turns in a random order too.

Which lane owns which element is drawn at random per shape of a store: two tensors of the same shape have the same
layout, as in the merge, where a lane stores what it loaded, and tensors of different shapes share nothing.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from triton.runtime import interpreter

SLICES = 3


class _Stopped(BaseException):
    """Ends the slices that are left when one of them has failed."""


class _Program:
    """One program of a launch, run by several slices of its lanes that take turns."""

    def __init__(self, random: np.random.Generator, body: Callable[[], None]) -> None:
        self.random, self.body = random, body
        self.present = 0  # the slice that runs
        self.turn = [threading.Semaphore(0) for _ in range(SLICES)]
        self.waiting: list[int] = []  # slices that have their turn before the next barrier
        self.ended: list[int] = []
        self.error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        threads = [threading.Thread(target=self._slice, args=(i,), daemon=True) for i in range(SLICES)]
        for thread in threads:
            thread.start()
        self._pass_on()
        self.done.wait()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def barrier(self) -> None:
        """Let the other slices come to this barrier before the present one goes on."""
        own = self.present
        self._pass_on()
        self._wait(own)

    def _wait(self, own: int) -> None:
        self.turn[own].acquire()
        if self.error is not None:
            raise _Stopped
        self.present = own

    def _slice(self, own: int) -> None:
        try:
            self._wait(own)
            self.body()
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.ended.append(own)
        if len(self.ended) == SLICES:
            self.done.set()
        else:
            self._pass_on()

    def _pass_on(self) -> None:
        if not self.waiting:
            left = [i for i in range(SLICES) if i not in self.ended]
            self.waiting = [int(i) for i in self.random.permutation(left)]
        self.turn[self.waiting.pop()].release()


@contextmanager
def apart(seed: int) -> Iterator[None]:
    """Run interpreted kernels with their warps apart, in an order drawn from ``seed``."""
    random = np.random.default_rng(seed)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    kept = builder.create_masked_store, builder.create_barrier, executor.__call__
    owners: dict[tuple[int, ...], np.ndarray] = {}
    running: list[_Program] = []

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *options: Any) -> Any:
        shape = np.shape(ptrs.data)
        if shape not in owners:
            # Every slice owns elements of every store that has enough of them.
            owners[shape] = random.permutation(np.resize(np.arange(SLICES), int(np.prod(shape)))).reshape(
                shape
            )
        own = interpreter.TensorHandle(mask.data & (owners[shape] == running[-1].present), mask.dtype)
        return kept[0](self, ptrs, value, own, *options)

    def call(self: Any, *arguments: Any, **options: Any) -> None:
        names = inspect.getfullargspec(self.fn).args
        options = {name: value for name, value in options.items() if name in names}
        scope = interpreter._patch_lang(self.fn)
        try:
            values = inspect.getcallargs(self.fn, *arguments, **options)
            values = {
                name: x if name in self.constexprs else interpreter._implicit_cvt(x)
                for name, x in values.items()
            }
            grid = (*self.grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            for place in random.permutation(list(np.ndindex(grid))):
                interpreter.interpreter_builder.set_grid_idx(*map(int, place))
                running.append(_Program(random, lambda: self.fn(**values)))
                running[-1].run()
        finally:
            scope.restore()

    builder.create_masked_store = masked_store
    builder.create_barrier = lambda self: running[-1].barrier()
    executor.__call__ = call
    try:
        yield
    finally:
        builder.create_masked_store, builder.create_barrier, executor.__call__ = kept
