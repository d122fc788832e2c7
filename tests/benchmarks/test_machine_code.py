"""Every shipped tile of the loss kernels, compiled ahead of time for GPUs that need not be here.

Compiling all of them takes long, so the committed results stand for it: their digest of the kernels' sources
and of the tiles is that of this checkout, and their Triton is the one that is installed. What they promise is
tested on all of them. sm_90's entries are compiled here again, to see that the numbers come out the same;
``make bench-check`` does so for every architecture.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from exact import differences

from benchmarks import disassembly, machine_code, roofline
from benchmarks.check import committed_results
from benchmarks.harness import RESULTS

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The benchmark in a process of its own: this one may be running Triton's interpreter."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.machine_code", "--json", *options],
        capture_output=True, text=True, env=kept | environment, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> dict:
    """What is compiled here."""
    done = run("--quick", "--architectures", "[sm_90]")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["results"]


@pytest.fixture(scope="module")
def results() -> dict:
    """The committed results."""
    return committed_results(RESULTS, same_machine=False)["parts"]["machine_code"]["results"]


@pytest.fixture(scope="module")
def found(results) -> list[dict]:
    return results["kernels"]


def test_the_committed_results_are_of_these_kernels(results):
    again = "the kernels have changed: measure again with make bench"
    assert results["sources"] == machine_code.sources(), again
    assert results["triton"] == triton.__version__, again


def test_only_code_counts_as_a_source(tmp_path):
    def code(text: str) -> str:
        return machine_code._code(iter(text.encode().splitlines(keepends=True)).__next__)

    before = code('"""A."""\nx = 1\ndef f(a):\n    """B."""\n    return "C"\n')
    assert code('x = 1  # one\n\n\ndef f(\n    a):\n    return "C"\n') == before
    assert code('x = 1\ndef f(a):\n    return "D"\n') != before
    assert code('x = 1\ndef f(a): return "C"\n') != code("x = 1\ndef f(a): pass\n")


def test_counts_are_as_committed(compiled):
    assert len(compiled["kernels"]) > 50
    assert differences("machine_code", compiled) == []


def test_every_configuration_is_there(found):
    """Each entry of each table in all of its uses; the kernels that merge once per kind."""
    shown = {
        (r["architecture"], r["kernel"], r["products"], r["bits"], tuple(r["tile"]), r["options"], r["width"])
        for r in found
    }
    for c in machine_code.shipped(list(ARCHITECTURES), quick=False):
        products, options = ("one", "several")[c.many], ("none", "all")[c.options]
        is_walk = c.form != machine_code.MEASURED or c.kernel == "backward"
        name = c.name if is_walk else f"combine of {c.name}"
        assert (c.arch, name, products, c.bits, c.tile[:3], options, c.width) in shown
    kinds = ["forward", "forward with stats", f"forward, {machine_code.ONE_WAY}"]
    for arch in ARCHITECTURES:
        kernels = {(r["kernel"], r["products"]) for r in found if r["architecture"] == arch}
        assert ("moving average", "none") in kernels
        for kind in kinds:
            merging = ["combine", "merge of rows", "merge of columns"][
                : 2 if machine_code.ONE_WAY in kind else 3
            ]
            for of in merging:
                assert {(f"{of} of {kind}", count) for count in ("one", "several")} <= kernels


def test_nothing_spills(found):
    assert [r for r in found if r["spilled"]] == []


def test_a_spill_is_an_error_that_shows_the_kernel(found, capsys):
    spilling = found[0] | {"spilled": 8}
    with pytest.raises(SystemExit, match="1 kernels spill registers"):
        machine_code.refuse_spills([*found[1:], spilling])
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 3
    assert spilling["kernel"] in shown[2]


def test_products_run_on_tensor_cores(found):
    """All of them in 16 bits; float32 products are exact, which NVIDIA's tensor cores are not."""
    plain = [r for r in found if r["bits"] == 16 and not r["kernel"].startswith(("combine", "merge"))]
    assert plain
    assert [r for r in plain if r["tensor_core"] < (4 if r["products"] == "several" else 1)] == []


def test_programs_fit_and_hide_latency(found):
    """At least four warps, one per scheduler, of every kernel fit a multiprocessor."""
    assert [r for r in found if r["resident_warps"] < 4] == []


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "columns", "warps", "resident"),
    [
        ("sm_90", 255, 48 << 10, 0, 8, 8),  # registers: 256 · 8 warps are all 2048
        ("sm_90", 32, 96 << 10, 0, 4, 8),  # two programs of 97 KiB, one of it lost
        ("gfx942", 96, 32 << 10, 0, 4, 8),  # two programs of 32 KiB, nothing lost
        ("sm_100", 32, 16 << 10, 256, 4, 8),  # half of the tensor memory each
        ("sm_80", 16, 0, 0, 8, 64),  # as many as there may be
    ],
)
def test_resident_warps(arch, registers, shared, columns, warps, resident):
    assert disassembly.resident_warps(arch, registers, shared, columns, warps) == resident


def test_no_recompilation_when_values_change(compiled):
    """In any form of the loss. With stats, one direction takes the walk of both and merges as they do."""
    kinds = ("forward_kernel", "combine_kernel", "merge_kernel", "backward_kernel")
    expected = {f"{kind}{form}" for kind in kinds for form in ("", f", {machine_code.ONE_WAY}")}
    expected |= {f"{kind}_kernel, {machine_code.MEASURED}" for kind in ("combine", "backward")}
    assert compiled["variants"] == dict.fromkeys([*expected, "sigmoid_kernel", "average_kernel"], 1)


def test_estimates_are_labelled_and_no_faster_than_a_card_allows(results):
    """The full objective's twelve products at the data sheet's rate are the floor of every estimate of it."""
    rows = [r for r in results["estimates"] if r["objective"] == "full objective"]
    assert {r["architecture"] for r in rows} == set(ARCHITECTURES)
    for row in rows:
        products = 12 * 2 * row["rows"] ** 2 * row["width"]
        floor = products / roofline.CARDS[row["architecture"]].tensor
        assert floor <= sum(row["estimate_seconds"].values()) < 6 * floor
        assert all(0.5 < share <= 1 for share in row["busy"].values())
    page = machine_code.report(results)
    assert "### Roofline: estimate, not measured" in page
    assert page.count("estimate for") == 2
    counted = {"architecture", "card", "objective", "rows", "width", "strips", "busy"}
    assert all(name.startswith("estimate_") for row in rows for name in row.keys() - counted)


def test_names_are_unique_and_the_table_shows_every_kernel(results):
    exact = machine_code.exact(results)
    visits = sum(len(row.get("visit") or {}) for row in results["kernels"])
    assert len(exact) == 3 * len(results["kernels"]) + visits + len(results["variants"])
    summary, full = machine_code.report(results), machine_code.report(results | {"full_table": True})
    assert full.count("\n| ") - summary.count("\n| ") == len(results["kernels"]) + 2  # and the table's head
    assert machine_code.highlights(results)[0].ours == "0 bytes"


def test_compiling_in_the_interpreter_is_refused():
    done = run("--quick", TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "TRITON_INTERPRET is set: unset it" in done.stderr
