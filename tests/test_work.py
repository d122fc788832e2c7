"""Work that the kernels execute stays what the algorithm needs. Counted in the interpreter, on CPU tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = """
import json
from benchmarks import work
counts = [work.count(name, 512, 256) for name in work.OBJECTIVES]
print(json.dumps([(c.objective, c.units, c.floor_units, c.byte_ratio) for c in counts]))
"""


@pytest.fixture(scope="module")
def counts() -> list:
    """Counted in a process of its own, so that it is the interpreter on a machine with a GPU too."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COUNT], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[1], env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_products_are_within_3_percent_of_the_floor(counts):
    assert len(counts) == 3
    for name, units, floor, _ in counts:
        assert sum(floor) == (12 if name == "full objective" else 4)
        for done, needed in zip(units, floor, strict=True):
            assert needed <= done <= 1.03 * needed, (name, units)


def test_bytes_are_within_a_quarter_of_one_visit_per_tile(counts):
    for name, _, _, ratio in counts:
        assert 1 <= ratio <= 1.25, (name, ratio)
