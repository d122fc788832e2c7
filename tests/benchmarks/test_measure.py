"""The instruments of the benchmarks: peaks of memory, counted allocations, turns, and the check of results."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import measure

MIB = 2**20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def allocate(mebibytes):
    """Return a call for ``peak_memory`` that holds this many MiB for a moment."""

    def hold(count):
        return torch.ones(count * MIB, dtype=torch.uint8, device=DEVICE)[0].item()

    hold(1)  # loads the libraries' own pages, as the small step of a benchmark does
    return lambda: hold(mebibytes)


def test_peak_memory_sees_what_is_freed_again():
    assert measure.peak_memory(__name__, "allocate", 200) == pytest.approx(200 * MIB, rel=0.1)


def broken():
    raise ValueError("this one fails")


def test_peak_memory_hands_on_errors():
    with pytest.raises(ValueError, match="this one fails"):
        measure.peak_memory(__name__, "broken")


def test_allocated_is_exact_and_finds_the_peak():
    x = torch.ones(1000)

    def call():
        a = x.new_empty(10_000)
        b = x.new_empty(20_000)
        del a
        return x.new_empty(5_000), b

    assert measure.allocated(call) == 4 * 30_000
    assert measure.allocated(lambda: None) == 0


def test_allocated_leaves_out_scratch_of_products_only():
    """The processor's library decides about that; the result is counted."""
    a, b = torch.ones(96, 160), torch.ones(160, 64)
    for dtype in (torch.float32, torch.bfloat16):
        left, right = a.to(dtype), b.to(dtype)
        assert measure.allocated(lambda: left @ right) == 96 * 64 * left.element_size()  # noqa: B023
    assert measure.allocated(lambda: (a @ b).neg()) == 2 * 96 * 64 * 4


def test_turns_are_taken():
    order = []
    times = measure.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 4
    assert times["a"].repeats == 3
    assert times["a"].low <= times["a"].median <= times["a"].high


def test_phases_are_timed_apart():
    phases = {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}
    times = measure.interleaved_phases({"call": phases}, repeats=3, warmup=0)["call"]
    assert list(times) == ["short", "long", measure.TOTAL]
    assert times["short"].median < 0.01 < times["long"].median
    assert times[measure.TOTAL].median == pytest.approx(times["short"].median + times["long"].median, rel=0.2)


def test_three_turns_whatever_the_budget():
    times = measure.interleaved({"call": lambda: time.sleep(0.001)}, repeats=9, budget=0.0)
    assert times["call"].repeats == 3


def test_spread_stays_within_what_was_measured():
    timing = measure.Timing.of([1.0, 2.0, 9.0])
    assert 1.0 <= timing.low <= timing.median == 2.0 <= timing.high <= 9.0
    assert measure.Timing.of([3.0]) == measure.Timing(3.0, 3.0, 3.0, 1)


def test_no_speed_without_a_right_result():
    measure.require_close("sum", torch.ones(3), torch.ones(3), 1e-6)
    for wrong in (torch.full((3,), 1.1), torch.full((3,), float("nan"))):
        with pytest.raises(SystemExit, match="wrong result, so nothing was timed: sum is off"):
            measure.require_close("sum", wrong, torch.ones(3), 1e-6)
