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


def machine_code(*options: str) -> list | dict:
    """Run the benchmark in a process of its own: this one may be running Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.machine_code", "--json", *options],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1], check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return machine_code("--quick")


def test_every_architecture_and_kernel_is_there(found):
    assert {r["case"]["arch"] for r in found} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        kernels = {
            (r["name"], r["case"]["kernel"], r["case"]["many"]) for r in found if r["case"]["arch"] == arch
        }
        assert (
            len({k for k in kernels if k[0] != "_combine_kernel"}) == 6
        )  # three kinds, one or four products
        assert len({k for k in kernels if k[0] == "_combine_kernel"}) == 4


def test_nothing_spills(found):
    assert [r for r in found if r["spilled"]] == []


def test_products_run_on_tensor_cores(found):
    """All of them in 16 bits; float32 products are exact, which NVIDIA's tensor cores are not."""
    plain = [r for r in found if r["case"]["bits"] == 16 and r["name"] != "_combine_kernel"]
    assert plain
    assert [r for r in plain if r["tensor_core"] < (4 if r["case"]["many"] else 1)] == []


def test_programs_fit_and_hide_latency(found):
    """At least four warps, one per scheduler, of every kernel fit a multiprocessor."""
    assert [r for r in found if r["resident_warps"] < 4] == []


def test_no_recompilation_when_values_change():
    counted = machine_code("--variants")
    assert counted == {"_forward_kernel": 1, "_combine_kernel": 1, "_backward_kernel": 1}
