"""What a GPU adds to the instruments: device time, cold caches, replayed graphs, named ranges.

Everything goes through ``torch.cuda``, which is CUDA's and ROCm's alike, and every size is asked of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch

# Caches beyond the second level (AMD's Infinity Cache) are in no device's properties: as large as any known.
_HIDDEN_CACHE = 256 << 20


class EventClock:
    """Device time between marks in a stream. Its start is a device that is idle and has cold caches."""

    def __init__(self) -> None:
        cache = max(torch.cuda.get_device_properties().L2_cache_size, _HIDDEN_CACHE)
        self._other = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")

    def start(self) -> torch.cuda.Event:
        torch.cuda.synchronize()
        self._other.zero_()  # whatever the caches held is replaced by this
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
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first call on a stream allocates must not be part of the graph
        for phase in phases.values():
            phase()
    torch.cuda.current_stream().wait_stream(side)
    pool = torch.cuda.graph_pool_handle()
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    try:
        for name, phase in phases.items():
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name], pool=pool):
                phase()
    except RuntimeError:  # it waits for the device, or does what no graph may hold
        torch.cuda.synchronize()
        return None
    return {name: graph.replay for name, graph in graphs.items()}


def named(name: str) -> AbstractContextManager[Any]:
    """A range in a profiler's timeline (NVTX, roctx); nothing on a machine without a GPU."""
    return torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()


def square() -> int:
    """Side of a square matrix product that fills the device: 16 tiles of 128×128 for each multiprocessor."""
    tiles = 16 * torch.cuda.get_device_properties().multi_processor_count
    return 1024 * -(-int(128 * tiles**0.5) // 1024)
