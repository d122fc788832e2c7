"""Work on pictures, batch by batch and in order, by threads that run a few batches ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
B = TypeVar("B")
DEPTH = 3  # batches that are worked on at once
CHUNKS = 4  # parts of a batch, for each thread


class Ahead(Generic[B, T]):
    """Iterate over the batches with the results of all their pictures: ``(batch, [result, …])``.

    Args:
        batches: a batch for each step, made when its work begins.
        size: the number of a batch's pictures.
        work: does some pictures of a batch, by their places in it; called in a thread.
        workers: threads.
    """

    def __init__(
        self,
        batches: Iterable[B],
        size: Callable[[B], int],
        work: Callable[[B, range], list[T]],
        workers: int,
    ) -> None:
        self._batches, self._size, self._work, self._workers = batches, size, work, workers

    def __iter__(self) -> Iterator[tuple[B, list[T]]]:
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="tracer-loader")
        waiting: deque[tuple[B, list[Future[list[T]]]]] = deque()
        batches = iter(self._batches)
        try:
            while True:
                while len(waiting) < DEPTH and (batch := next(batches, None)) is not None:
                    waiting.append((batch, self._begin(pool, batch)))
                if not waiting:
                    return
                batch, parts = waiting.popleft()
                yield batch, [result for part in parts for result in part.result()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, batch: B) -> list[Future[list[T]]]:
        count = self._size(batch)
        step = max(1, -(-count // (CHUNKS * self._workers)))
        parts = (range(start, min(start + step, count)) for start in range(0, count, step))
        return [pool.submit(self._work, batch, places) for places in parts]
