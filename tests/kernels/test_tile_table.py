"""Every entry of the device's tile table, as the launchers use it, against the definition in float64.

On a GPU all of them with every kind of option, dtype and width, on about eight tiles each way whose edges are
ragged; in the interpreter a few of the cases, smaller.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from typing import NamedTuple

import pytest
import torch
from kernel_calls import CLIP, FULL, check, options, problem
from sigmoid_calls import biases, pairwise
from sigmoid_calls import check as check_pairs
from triton_interpreter import DEVICE, HAS_GPU

from benchmarks.competitors import float32_products
from tracer.kernels import _tiles
from tracer.kernels._tiles import LIKE, TABLES, Tile, tiles_of
from tracer.kernels._triton import gpu, planning_for

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TILES, WIDTHS, EVERY = (8, (512, 520), 1) if HAS_GPU else (2, (16, 24), 31)
DTYPES = {16: (torch.bfloat16, torch.float16), 19: (torch.float32,), 32: (torch.float32,)}
# In TF32 the products of torch and of ours round differently: 10 bits of an operand remain.
TF32_SLACK = 2e-3


# The entries of the table that the two passes of a call take, by its form.
ENTRIES = {
    "both ways": ("forward", "backward"),
    "plain": ("forward, plain", "backward, plain"),
    "stats": ("forward with stats", "backward"),
    "one way": ("forward, one way", "backward, one way"),
    "sigmoid": ("sigmoid", "sigmoid"),
}


class Case(NamedTuple):
    """The tiles of both passes, and what they are used for."""

    form: str
    many: bool  # the whole objective
    bits: int
    forward: Tile
    backward: Tile
    dtype: torch.dtype
    labelled: bool  # labels, margin and smoothing
    width: int
    multiprocessors: int | None  # those of the grid; None: the device's own

    def __str__(self) -> str:
        what = "full" if self.many else "clip"
        tiles = "-".join("x".join(map(str, tile)) for tile in (self.forward, self.backward))
        dtype = "tf32" if self.bits == 19 else str(self.dtype).removeprefix("torch.")
        rest = ("labels" * self.labelled, f"D{self.width}", f"on{self.multiprocessors}")
        return "-".join([self.form, what, dtype, tiles, *filter(None, rest)])


def cases() -> list[Case]:
    table = _tiles._table_of(DEVICE)
    found = []
    for (many, bits), (form, entries) in product(
        sorted({(many, bits) for _, many, bits in table}), ENTRIES.items()
    ):
        if form == "plain" and many:
            continue
        forward, backward = (tiles_of(table, kernel, many, bits) for kernel in entries)
        pairs = [
            (forward[min(i, len(forward) - 1)], backward[min(i, len(backward) - 1)])
            for i in range(max(len(forward), len(backward)))
        ]
        labelled = (form != "plain",) if form in ("plain", "both ways") and not many else (False, True)
        uses = product(pairs, DTYPES[bits], labelled, WIDTHS, (None, 4))
        found += [
            Case(form, many, bits, *tiles, dtype, with_labels, width, multiprocessors)
            for tiles, dtype, with_labels, width, multiprocessors in uses
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
    directions = {"image_to_text": 1.0, "text_to_image": 0.0} if case.form == "one way" else {}
    chosen = options(margin, smoothing, FULL if case.many else CLIP, stats=case.form == "stats", **directions)
    assert chosen.one_way == (case.form == "one way")
    forced = planning_for(gpu(DEVICE).architecture, case.multiprocessors or 1)
    slack = {"slack": TF32_SLACK} if case.bits == 19 else {}
    with (
        forced if case.multiprocessors else nullcontext(),
        float32_products("tf32" if case.bits == 19 else "fp32"),
    ):
        if case.form == "sigmoid":
            terms = FULL[:2] if case.many else CLIP
            pairs = pairwise(terms, margin)
            check_pairs("triton", inputs, biases(), pairs, dtype=case.dtype, tile=case.forward, **slack)
        else:
            check(inputs, chosen, dtype=case.dtype, tile=case.forward, backward_tile=case.backward, **slack)


def test_every_kind_of_case_is_there():
    """In the interpreter too, where most combinations are left out."""
    everything = cases()
    for field in Case._fields:
        assert {getattr(case, field) for case in CASES} == {getattr(case, field) for case in everything}
    kinds = {(case.form, case.many) for case in everything}
    assert len(kinds) == 2 * len(ENTRIES) - 1  # plain ones have one product
    assert {(case.form, case.many) for case in CASES} == kinds


def test_every_entry_of_every_table_is_of_a_form_that_is_checked():
    checked = {kernel for entries in ENTRIES.values() for kernel in entries}
    assert {kernel for table in TABLES.values() for kernel, _, _ in table} | set(LIKE) == checked
