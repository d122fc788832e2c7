"""Instruments for a GPU: device time, cold caches, replayed graphs and named ranges in a profiler's timeline.

They use ``torch.cuda`` alone, which serves CUDA and ROCm, and read every size from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch

# Device properties do not show caches beyond the second level (AMD's Infinity Cache): the largest known size.
_HIDDEN_CACHE = 256 << 20


class EventClock:
    """A clock that measures device time between marks in a stream, starting from cold caches.

    While the device overwrites its caches the host runs ahead, which hides launches that take less time than
    that. Where a phase is still bound by Python, its time is the host's; replayed graphs show the device's.
    """

    def __init__(self) -> None:
        cache = max(torch.cuda.get_device_properties().L2_cache_size, _HIDDEN_CACHE)
        self._other = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")

    def start(self) -> torch.cuda.Event:
        """Overwrite the caches and return the first mark."""
        torch.cuda.synchronize()
        self._other.zero_()
        return self.mark()

    def mark(self) -> torch.cuda.Event:
        """Return a mark of the present place in the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """Return the seconds from each mark to the next."""
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def captured(phases: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], None]] | None:
    """Capture the phases as graphs and return their replays in order, or None where a phase can't be captured.

    A replay launches all kernels of a phase at once, so even small kernels show the device's time and not the
    time that Python takes to launch them. Later phases may use what earlier phases left in memory.
    """
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(current)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    pool = torch.cuda.graph_pool_handle()
    # A capture that fails leaves its own stream current and the allocator's pool open. So a first call outside the
    # capture shows whether a phase waits for the device, and the current stream is restored in any case. The first
    # call also makes the allocations that the graph should not contain.
    with torch.cuda.stream(current):
        try:
            with torch.cuda.stream(side), _no_waiting():
                for phase in phases.values():
                    phase()
            current.wait_stream(side)
            for name, phase in phases.items():
                graphs[name] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[name], pool=pool):
                    phase()
        except (
            RuntimeError
        ):  # a phase waits for the device, or does something else that a graph can't contain
            torch.cuda.synchronize()
            return None
    return {name: graph.replay for name, graph in graphs.items()}


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Make torch operations within the block raise RuntimeError if they wait for the device."""
    kept = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(kept)


def timeline_range(name: str) -> AbstractContextManager[Any]:
    """Name a range in a profiler's timeline (NVTX, roctx); does nothing on a machine without a GPU."""
    return torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()


def matrix_side() -> int:
    """Return the side of a square matrix product that fills the device: 16 tiles of 128×128 a multiprocessor."""
    tiles = 16 * torch.cuda.get_device_properties().multi_processor_count
    return 1024 * -(-int(128 * tiles**0.5) // 1024)
