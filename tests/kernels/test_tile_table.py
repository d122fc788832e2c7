"""Every entry of the device's tile table, as the launchers use it, against the definition in float64.

On a GPU all of them with every kind of option, dtype and width, on about eight tiles each way whose edges are
ragged; in the interpreter every 25th case, smaller.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from typing import NamedTuple

import pytest
import torch
from kernel_calls import CLIP, FULL, check, options, problem
from triton_interpreter import DEVICE, HAS_GPU

from benchmarks.competitors import float32_products
from tracer.kernels import _tiles
from tracer.kernels._tiles import Tile
from tracer.kernels._triton import gpu, planning_for

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TILES, WIDTHS, EVERY = (8, (512, 520), 1) if HAS_GPU else (2, (16, 24), 25)
DTYPES = {16: (torch.bfloat16, torch.float16), 19: (torch.float32,), 32: (torch.float32,)}
# In TF32 the products of torch and of ours round differently: 10 bits of an operand remain.
TF32_SLACK = 2e-3


class Case(NamedTuple):
    """The tiles of both passes, and what they are used for."""

    many: bool  # the whole objective
    bits: int
    forward: Tile
    backward: Tile
    dtype: torch.dtype
    stats: bool
    labelled: bool  # labels, margin and smoothing
    width: int
    multiprocessors: int | None  # those of the grid; None: the device's own

    def __str__(self) -> str:
        what = "full" if self.many else "clip"
        tiles = "-".join("x".join(map(str, tile)) for tile in (self.forward, self.backward))
        dtype = "tf32" if self.bits == 19 else str(self.dtype).removeprefix("torch.")
        rest = ("stats" * self.stats, "labels" * self.labelled, f"D{self.width}", f"on{self.multiprocessors}")
        return "-".join([what, dtype, tiles, *filter(None, rest)])


def cases() -> list[Case]:
    table = _tiles._table_of(DEVICE)
    found = []
    for (kernel, many, bits), backward in table.items():
        if kernel != "backward":
            continue
        for stats in (False, True):
            forward = table["forward with stats" if stats else "forward", many, bits]
            pairs = [
                (forward[min(i, len(forward) - 1)], backward[min(i, len(backward) - 1)])
                for i in range(max(len(forward), len(backward)))
            ]
            uses = product(pairs, DTYPES[bits], (False, True), WIDTHS, (None, 4))
            found += [
                Case(many, bits, *tiles, dtype, stats, labelled, width, multiprocessors)
                for tiles, dtype, labelled, width, multiprocessors in uses
            ]
    return found


CASES = cases()[::EVERY]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_entry_is_right(case):
    N = TILES * case.forward.block_n - 3
    M = TILES * case.forward.block_m + 5 if case.labelled else N
    inputs = problem(
        N, M, case.width, dtype=case.dtype, labels="some" if case.labelled else None, teacher=case.many
    )
    margin, smoothing = (0.2, 0.1) if case.labelled else (0.0, 0.0)
    chosen = options(margin, smoothing, FULL if case.many else CLIP, stats=case.stats)
    forced = planning_for(gpu(DEVICE).architecture, case.multiprocessors or 1)
    slack = {"slack": TF32_SLACK} if case.bits == 19 else {}
    with (
        forced if case.multiprocessors else nullcontext(),
        float32_products("tf32" if case.bits == 19 else "fp32"),
    ):
        check(inputs, chosen, dtype=case.dtype, tile=case.forward, backward_tile=case.backward, **slack)


def test_every_kind_of_case_is_there():
    """In the interpreter too, where most combinations are left out."""
    everything = cases()
    for field in Case._fields:
        assert {getattr(case, field) for case in CASES} == {getattr(case, field) for case in everything}
