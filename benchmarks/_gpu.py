"""What a GPU adds to the instruments: device time, cold caches, replayed graphs, named ranges.

Everything goes through ``torch.cuda``, which is CUDA's and ROCm's alike, and every size is asked of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch

# Caches beyond the second level (AMD's Infinity Cache) are in no device's properties: as large as any known.
_HIDDEN_CACHE = 256 << 20


class EventClock:
    """Device time between marks in a stream, from cold caches.

    While the device empties its caches the host runs ahead, so launching is hidden where it is the shorter of the
    two; where a phase is still bound by Python its time is the host's, and replayed graphs tell the device's.
    """

    def __init__(self) -> None:
        cache = max(torch.cuda.get_device_properties().L2_cache_size, _HIDDEN_CACHE)
        self._other = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")

    def start(self) -> torch.cuda.Event:
        torch.cuda.synchronize()
        self._other.zero_()  # whatever the caches held is replaced by this, a fifth of a millisecond or so
        return self.mark()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """From each mark to the next."""
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def captured(phases: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], None]] | None:
    """The phases as graphs, to be replayed in their order; None where one of them can't be captured.

    A replay launches all kernels of a phase at once, so the time of small ones is the device's alone and not
    that of Python launching them. Later phases may use what earlier ones left in memory.
    """
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(current)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    pool = torch.cuda.graph_pool_handle()
    # A capture that fails leaves its own stream current and the allocator's pool open: so what waits for the
    # device is found before, and the stream is put back whatever happens.
    with torch.cuda.stream(current):
        try:
            with (
                torch.cuda.stream(side),
                _no_waiting(),
            ):  # and what a first call allocates is no part of the graph
                for phase in phases.values():
                    phase()
            current.wait_stream(side)
            for name, phase in phases.items():
                graphs[name] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[name], pool=pool):
                    phase()
        except RuntimeError:  # it waits for the device, or does what no graph may hold
            torch.cuda.synchronize()
            return None
    return {name: graph.replay for name, graph in graphs.items()}


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Within, a torch operation that waits for the device raises RuntimeError."""
    kept = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(kept)


def named(name: str) -> AbstractContextManager[Any]:
    """A range in a profiler's timeline (NVTX, roctx); nothing on a machine without a GPU."""
    return torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()


def square() -> int:
    """Side of a square matrix product that fills the device: 16 tiles of 128×128 for each multiprocessor."""
    tiles = 16 * torch.cuda.get_device_properties().multi_processor_count
    return 1024 * -(-int(128 * tiles**0.5) // 1024)
