"""The benchmark of cached gradients in miniature."""

from __future__ import annotations

import json

import pytest

from benchmarks import micro_batches
from benchmarks.harness import plain
from benchmarks.micro_batches import ACCUMULATED, CACHED, ONE_SHOT


@pytest.fixture(scope="module")
def results() -> dict:
    measured = micro_batches.measure(cases=["tracer-demo:12"], count=4, precision="fp32", repeats=3)
    return json.loads(json.dumps(measured, default=plain))


def test_activations_are_those_of_a_micro_batch(results):
    (case,) = results["cases"]
    assert case["times"].keys() == {ONE_SHOT, CACHED, ACCUMULATED}
    assert case["activations"][CACHED] < 0.3 * case["activations"][ONE_SHOT]


def test_a_batch_that_does_not_divide_evenly():
    """9 pairs in at most 4 micro-batches are 3 of 3 pairs, on which the engine steps once."""
    (case,) = micro_batches.measure(cases=["tracer-demo:9"], count=4, precision="fp32", repeats=1)["cases"]
    assert case["micro_batches"] == 3


def test_tables(results):
    text = micro_batches.report(results)
    assert "tracer-demo, 12 pairs in 4 micro-batches, fp32" in text
    assert micro_batches.highlights(results)[0].what.startswith("cached gradients, tracer-demo, 12 pairs")
    assert len(micro_batches.ratios(results)) == 2
