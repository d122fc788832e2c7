"""The instruments of a GPU: replayed graphs, device time, and a product that fills the device.

conftest.py leaves this file out on a machine without a GPU.
"""

from __future__ import annotations

import torch

from benchmarks import competitors, gpu, measure


def test_replayed_graphs_compute_what_the_calls_do():
    step = competitors.Problem(256, 64).step("full", competitors.OURS, "fp32")
    step()
    expected = [x.clone() for x in step.result()]
    graphs = gpu.captured(step.phases)
    assert graphs is not None
    assert list(graphs) == ["forward", "backward"]
    for value in (step.value, *step.grads):
        value.detach().zero_()
    for replay in graphs.values():
        replay()
    for got, right in zip(step.result(), expected, strict=True):
        torch.testing.assert_close(got, right)


def test_what_waits_for_the_device_is_not_captured():
    x = torch.ones(8, device="cuda")
    assert gpu.captured({"call": lambda: x.sum().item()}) is None
    assert float((x + 1).sum()) == 16  # and the device works on


def test_device_time_is_that_of_the_device():
    """A product known to take far longer than its launch."""
    a = torch.randn(2, 4096, 4096, device="cuda")
    times = measure.interleaved(
        {"one": lambda: a[0] @ a[1], "four": lambda: [a[0] @ a[1] for _ in range(4)]}, repeats=5
    )
    assert 3 < times["four"].median / times["one"].median < 5


def test_a_measured_rate_fills_the_device():
    side, processors = gpu.matrix_side(), torch.cuda.get_device_properties().multi_processor_count
    assert side % 1024 == 0
    assert (side / 128) ** 2 >= 16 * processors
