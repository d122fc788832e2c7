"""The kernels of other packages are right before they are counted, and what is counted of them and of ours."""

from __future__ import annotations

import json

import pytest
import torch
from exact import differences

from benchmarks import measure, others
from benchmarks.counting import Traffic
from benchmarks.harness import run_part
from benchmarks.packages import MEMEFF, SIGLIP_KERNEL

KERNEL = {
    "architecture": "sm_80", "who": MEMEFF, "kernel": "clip_denom_kernel", "bits": 16, "warps": 4, "stages": 3,
    "registers": 255, "spilled": 0, "shared": 65536, "tensor_core": 128, "resident_warps": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict:
    """What the process of the part that interprets returns, and the row of a kernel."""
    counted = json.loads(json.dumps(others.count_all([("sm_90", 256, 64)])))
    return counted | {
        "versions": {"memeff": "0.3.1", "siglip-kernel": "0.1.2"},
        "triton": "3.8.0",
        "kernels": [KERNEL],
    }


@pytest.fixture(scope="module")
def counted(results) -> dict[str, dict]:
    return {row["who"]: row for row in results["work"]}


def test_counts_are_as_committed():
    """In processes of their own: this one interprets."""
    measured = run_part("others", quick=True)["results"]
    assert differences("others", measured) == []


def total(row: dict, what: str) -> float:
    return sum(row[what].values())


def test_memeff_takes_a_product_more_than_ours_and_atomics(counted):
    """It recomputes the logits for each tower's gradient."""
    ours, theirs = counted[others.OURS], counted[MEMEFF]
    assert total(ours, "units") == 4
    assert total(theirs, "units") == 5
    assert total(ours, "atomics") == 0
    assert total(theirs, "atomics") == 2 * ours["rows"] * (ours["rows"] // 128)  # its tiles are 128 wide
    assert total(ours, "bytes") < total(theirs, "bytes")
    assert total(ours, "torch_bytes") < total(theirs, "torch_bytes")


def test_siglip_kernel_takes_three_products_of_another_loss(counted):
    assert total(counted[SIGLIP_KERNEL], "units") == 3
    assert counted[SIGLIP_KERNEL]["launches"]["backward"] == 0


def test_our_forward_pass_copies_no_tower(results):
    memory = {row["who"]: row for row in results["memory"]}
    tower = 2 * memory[others.OURS]["rows"] * memory[others.OURS]["width"]
    assert memory[others.OURS]["forward"] < tower / 2
    assert memory[MEMEFF]["forward"] > 3 * tower


def test_what_is_published_stands_beside_estimates(results):
    rows = {row["who"]: row for row in results["estimates"]}
    a100 = rows[MEMEFF]
    assert (a100["pairs"], a100["width"], a100["seconds"]) == (65536, 512, 0.201)
    assert 4 / 5 * a100["estimate_their_products"] <= a100["estimate_ours"] < a100["estimate_their_products"]
    page = others.report(results)
    for words in ("**Counted**", "**Compiled**", "**Published**", "**estimates**", "| 5.00 |"):
        assert words in page
    assert others.highlights(results)[0][1:] == ("4.00 N²D", "5.00 N²D (memeff 0.3.1)", "1.25×")


def test_every_count_has_a_name_of_its_own(results):
    rows = 5 * 2 * len(results["work"]) + 2 * len(results["memory"]) + 3 * len(results["kernels"])
    assert len(others.exact(results)) == rows
    twice = results | {"kernels": results["kernels"] * 2}
    assert len(others.exact(twice)) == rows + 3 * len(results["kernels"])


def test_a_wrong_package_ends_the_count():
    image, text = others._features(16, 8)
    grads = (image, text, None)
    with pytest.raises(measure.WrongResult, match="loss of memeff is off"):
        others.require_agreement(MEMEFF, torch.tensor(1.0), grads)


def test_torchs_traffic_is_what_operations_read_and_write():
    x, out = torch.ones(8, 16), torch.empty(8, 8)
    with Traffic() as moved:
        x.T.reshape(4, 32)  # a copy: 128 numbers read and 128 written
        assert moved.bytes == 4 * 256
        torch.empty(100)
        x.view(2, 64)
        torch.mm(x, x.T, out=out)  # twice 128 read and 64 written
        torch.zeros_like(x)
    assert moved.bytes == 4 * (256 + 320 + 128)


def test_the_part_compiles_and_does_not_interpret(monkeypatch):
    monkeypatch.setattr(others.triton.knobs.runtime, "interpret", True)
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set: unset it"):
        others.measure(quick=True)
