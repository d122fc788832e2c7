"""Every shipped tile of the loss kernels, compiled ahead of time for GPUs that need not be here.

All 16-bit entries of every architecture, with all options; float32 ones, exact and TF32, all of sm_90's and
where another architecture's tile differs. ``python -m benchmarks.machine_code`` in full adds float32 on every
architecture, the variants without options, widths that no block divides, and the combine kernel per tile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from exact import differences

from benchmarks import disassembly, machine_code, roofline

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The benchmark in a process of its own: this one may be running Triton's interpreter."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.machine_code", "--json", *options],
        capture_output=True, text=True, env=kept | environment, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict:
    done = run("--quick")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["results"]


@pytest.fixture(scope="module")
def found(results) -> list[dict]:
    return results["kernels"]


def test_counts_are_as_committed(results):
    assert differences("machine_code", results) == []


def test_every_architecture_and_kernel_is_there(found):
    assert {r["architecture"] for r in found} == set(ARCHITECTURES)
    for arch in ARCHITECTURES:
        kernels = {(r["kernel"], r["products"]) for r in found if r["architecture"] == arch}
        merged, backward = ["forward", "forward with stats"], ["backward"]
        if arch == "sm_90":
            merged += [f"forward, {machine_code.ONE_WAY}"]
            backward += [f"backward, {form}" for form in (machine_code.ONE_WAY, machine_code.SIGMOID)]
        kinds = [*merged, *backward, *(f"combine of {kind}" for kind in merged)]
        assert kernels == {(kind, count) for kind in kinds for count in ("one", "several")} | {
            ("moving average", "none")
        }


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
    plain = [r for r in found if r["bits"] == 16 and "combine" not in r["kernel"]]
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


def test_no_recompilation_when_values_change(results):
    assert results["variants"] == {"forward_kernel": 1, "combine_kernel": 1, "backward_kernel": 1}


def test_estimates_are_labelled_and_no_faster_than_a_card_allows(results):
    """The full objective's twelve products at the data sheet's rate are the floor of every estimate of it."""
    rows = [r for r in results["estimates"] if r["objective"] == "full objective"]
    assert {r["architecture"] for r in rows} == set(ARCHITECTURES)
    for row in rows:
        products = 12 * 2 * row["rows"] ** 2 * row["width"]
        floor = products / roofline.CARDS[row["architecture"]].tensor
        assert floor <= sum(row["estimate_seconds"].values()) < 5 * floor
        assert all(0.5 < share <= 1 for share in row["busy"].values())
    page = machine_code.report(results)
    assert "### Roofline: estimate, not measured" in page
    assert page.count("estimate for") == 2
    counted = {"architecture", "card", "objective", "rows", "width", "strips", "busy"}
    assert all(name.startswith("estimate_") for row in rows for name in row.keys() - counted)


def test_names_are_unique_and_the_table_shows_every_kernel(results):
    exact = machine_code.exact(results)
    assert len(exact) == 3 * len(results["kernels"]) + len(results["variants"])
    summary, full = machine_code.report(results), machine_code.report(results | {"full_table": True})
    assert full.count("\n| ") - summary.count("\n| ") == len(results["kernels"]) + 2  # and the table's head
    assert machine_code.highlights(results)[0].ours == "0 bytes"


def test_compiling_in_the_interpreter_is_refused():
    done = run("--quick", TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "TRITON_INTERPRET is set: unset it" in done.stderr
