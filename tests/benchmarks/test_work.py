"""Work that the kernels execute stays what the algorithm needs. Counted in the interpreter, on CPU tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from exact import differences

from benchmarks import counting, work


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """The benchmark in a process of its own, so that it is the interpreter on a machine with a GPU too."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.work", *options],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict:
    done = run("--quick", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["results"]


def test_counts_are_as_committed(results):
    assert differences("work", results) == []


def test_products_are_within_3_percent_of_the_floor(results):
    assert len(results["loss"]) == 3
    for row in results["loss"]:
        assert sum(row["floor_units"].values()) == (12 if row["objective"] == "full objective" else 4)
        for name, needed in row["floor_units"].items():
            assert needed <= row["units"][name] <= 1.03 * needed, row


def test_products_of_the_forms_are_the_floor(results):
    """Ours and memeff's LiT loss alike; a sigmoid leaves nothing for the backward pass."""
    sums = {(row["form"], row["who"]): sum(row["units"].values()) for row in results["forms"]}
    assert sums == {(row["form"], row["who"]): row["floor"] for row in results["forms"]}
    assert {name for name, who in sums if who != "TRACER"} == {"LiT: one direction, images locked"}
    floors = {row["form"]: row["floor"] for row in results["forms"]}
    assert (floors["sigmoid"], floors["one direction"], floors["both directions, images locked"]) == (3, 4, 3)
    assert next(row for row in results["forms"] if row["form"] == "sigmoid")["units"]["backward"] == 0


def test_published_formulation_needs_more_products(results):
    assert [row["published_units"] for row in results["loss"]] == [6, 6, 20]


def test_bytes_are_within_a_quarter_of_one_visit_per_tile(results):
    for row in results["loss"]:
        assert 1 <= sum(row["bytes"].values()) / sum(row["floor_bytes"].values()) <= 1.25, row


def test_a_pass_takes_few_launches_and_exponentials(results):
    """Walk and merge forward, one strip backward; a row's and a column's exponential per softmax and logit.

    Merging the statistics of tiles takes a few more, of the full objective's 32×64 tiles 6 %.
    """
    for row in results["loss"]:
        assert row["launches"] == {"forward": 2, "backward": 1}
        softmaxes = 8 if row["objective"] == "full objective" else 2
        for count in row["exponentials_per_logit"].values():
            assert softmaxes <= count <= 1.07 * softmaxes, row


def test_moving_average_is_one_launch_at_the_floor_of_bytes(results):
    floors = {row["mode"]: row["floor_bytes_per_parameter"] for row in results["average"]}
    assert floors == {"fp32": 12, "fp32 + bf16 copy": 14, "bf16 + bf16 copy": 12}
    for row in results["average"]:
        assert row["launches"] == 1
        table = row["bytes_per_parameter"] - row["floor_bytes_per_parameter"]
        assert 0 < table < 0.03, row


def test_memory_does_not_grow_with_the_matrix(results):
    """Twice the rows: at most twice the memory, which at 16384 is a third of one matrix in 16 bits."""
    for objective in work.OBJECTIVES:
        small, large = (row for row in results["memory"] if row["objective"] == objective)
        assert large["rows"] == 2 * small["rows"]
        for name in ("forward", "saved", "backward"):
            assert small[name] < large[name] <= 2.001 * small[name], (objective, name)
        assert 3 * large["backward"] < large["matrix"]
        assert large["saved"] < 48 * large["rows"]  # five float32 per row and per column


def test_allocations_are_counted_while_they_live():
    import torch

    inputs = torch.zeros(1024)
    with counting.Allocated(inputs) as made:
        inputs.view(2, 512).add_(1)  # no memory of its own
        kept = inputs + 1
        for _ in range(3):
            kept[:10].clone()
            (kept * 2).sum()
    assert made.alive == 4 * 1024
    assert 2 * 4 * 1024 < made.peak < 2 * 4 * 1024 + 64


def test_every_count_has_a_name_and_a_place_in_the_tables(results):
    exact = work.exact(results)
    assert exact["work full objective sm_90 512x256 units forward"] == 4
    assert exact["work moving average fp32 + bf16 copy launches"] == 1
    assert exact["memory CLIP sm_90 16384x512 saved"] > 0
    page = work.report(results)
    for row in results["loss"]:
        assert f"| {row['objective']}" in page
    for row in results["forms"]:
        assert f"| {row['form']}" in page
    assert exact["work sigmoid, TRACER, sm_90 units forward"] == 3
    assert "| 12.00 | 12" in page
    assert "counted" in page.lower()
    assert work.highlights(results)[0].ratio == "1.67×"


def test_counting_outside_the_interpreter_is_refused():
    """Without it nothing would be counted, and zeros would look like little work."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.work", "--quick"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2], env=environment,
    )  # fmt: skip
    assert done.returncode != 0
    assert "set TRITON_INTERPRET=1" in done.stderr
