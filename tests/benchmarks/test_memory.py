"""The counted memory of the loss: the same on every machine, and linear in N for TRACER."""

from __future__ import annotations

import pytest
import torch
from exact import differences

from benchmarks import competitors, measure, memory
from tracer.kernels import _blocked_tile, _grid

MIB = 2**20


@pytest.mark.parametrize("case", ["full", "clip"])
def test_counted_memory_repeats_on_any_number_of_threads(case):
    kept, counts = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with memory.one_thread():
                counts.append(memory._count(case, "fp32", memory.BLOCKED, [1024], 64))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(kept)
    assert counts[0] == counts[1]


def test_counted_memory_is_the_same_on_any_processor(monkeypatch):
    """MKL's products go to the tile itself, oneDNN's come in memory of their own."""
    counts = []
    for intel in (False, True):
        monkeypatch.setattr(_blocked_tile, "mkl_knows_this_processor", lambda: intel)  # noqa: B023
        with memory.one_thread(), memory.any_processor():
            counts.append(memory._count("clip", "fp32", memory.BLOCKED, [1024], 64))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", [memory.BLOCKED, memory.TRITON])
def test_counted_memory_of_ours_holds_no_matrix(name):
    """At N 4096, D 8: one float32 matrix would be 64 MiB. The strip of gradients has a fixed bound."""
    with memory.one_thread(), memory.launches_left_out():
        count = measure.allocated(memory._step("clip", "fp32", name, 4096, 8))
    assert count < 16 * MIB + (_grid.STRIP_BYTES if name == memory.TRITON else 0)


def test_counted_memory_of_the_definition_holds_matrices():
    with memory.one_thread():
        small, large = memory._count("clip", "fp32", competitors.EAGER, [512, 1024], 8).values()
    assert large > 4 * 4 * 1024**2
    assert 3.9 < large / small < 4.1


def test_counts_are_as_committed():
    assert differences("memory", memory.measure(quick=True)) == []


def test_memory_in_miniature(monkeypatch):
    monkeypatch.setattr(memory, "SIZES", (128, 256))
    namele, quick = memory.measure(width=8), memory.measure(quick=True, width=8)
    assert memory.exact(quick).items() <= memory.exact(namele).items()
    assert memory.exact(namele)["clip fp32 N 256 D 8: open_clip, bytes"] > 4 * 4 * 256**2
    assert "×" in memory.report(namele)
    assert "128" in memory.report(quick)  # one size: nothing doubles
