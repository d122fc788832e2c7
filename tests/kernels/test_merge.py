"""The merge of column statistics in the forward kernel: many tiles per program, and warps that race.

Column statistics of a row of tiles are parked in scratch memory by the lanes that hold them and merged by others,
so barriers stand on both sides of the merge. The plain interpreter ignores them; ``warp_orders`` does not.
"""

from __future__ import annotations

import pytest
import torch
from column_statistics import assert_right
from kernel_calls import SMALL, options, problem
from planted import BARRIERS, BUGS, planted
from triton_interpreter import DEVICE, HAS_GPU

from tracer.kernels._grid import plan
from tracer.kernels._tiles import MERGE, Tile
from tracer.kernels._triton import tl, triton
from tracer.kernels._triton_tile import (
    PARTIALS,
    S_ARG,
    S_MAX,
    empty_statistics,
    load_statistics,
    merge,
    own_part,
    store_statistics,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TILES = (SMALL, Tile(32, 16, 16, 4, 1))
MEASURED = options(0.3, 0.1, teacher_temperature=1.25, stats=True)


# Ragged on both sides; columns of a program on both sides of a block of the merge, and exactly one such block.
@pytest.mark.parametrize("size", [(45, 70, 16), (61, MERGE + 9, 16), (33, MERGE, 24)], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 3])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.block_n}x{tile.block_m}")
def test_each_statistic_of_each_row_and_column(size, multiprocessors, tile):
    assert_right(problem(*size), MEASURED, multiprocessors=multiprocessors, tile=tile)


def test_few_multiprocessors_make_programs_of_many_tiles():
    """What the test above relies on, on a GPU too: parked statistics are replaced, and merged block by block."""
    assert plan(45, 70, SMALL, 1).rectangle == (3, 3)
    for tile in TILES:
        for multiprocessors in (1, 3):
            grid = plan(61, MERGE + 9, tile, multiprocessors)
            assert grid.rectangle[0] * grid.rectangle[1] >= 4


@triton.jit
def _argmax_kernel(x_ptr, scratch_ptr, out_ptr, first, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Take a tile's row statistics at columns from ``first`` on through the scratch, as the walk does."""
    at, zero = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    b_x = tl.load(x_ptr + at[:, None] * BLOCK + at[None, :])
    part, _ = own_part(b_x, b_x > 0, first + at, zero[None, :], SLOTS, S_MAX, 1)
    state = merge(empty_statistics(S_MAX, S_ARG, BLOCK), part, SLOTS, S_MAX)
    store_statistics(scratch_ptr, at, at < BLOCK, BLOCK, state, SLOTS, S_MAX)
    state = load_statistics(scratch_ptr, at, at < BLOCK, BLOCK, SLOTS, S_MAX, S_ARG)
    tl.store(out_ptr + at, state[S_ARG - S_MAX])


def test_indices_above_2_to_the_24():
    """float32 would round each odd index there."""
    x, first = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE), 2**24 + 1
    scratch, out = torch.empty(5, 16, device=DEVICE), torch.empty(16, device=DEVICE, dtype=torch.int32)
    slots = tuple(i - S_MAX.value if S_MAX.value <= i <= S_ARG.value else -1 for i in range(len(PARTIALS)))
    _argmax_kernel[(1,)](x, scratch, out, first, SLOTS=slots, BLOCK=16)
    assert torch.equal(out, (first + x.argmax(1)).int())


if not HAS_GPU:  # a GPU orders its warps itself
    from warp_orders import apart

    @pytest.mark.parametrize("seed", range(4))
    def test_the_order_of_warps_does_not_matter(seed):
        with apart(seed):
            assert_right(problem(45, 70, 16), MEASURED, multiprocessors=1)

    @pytest.mark.parametrize("name", BARRIERS)
    def test_a_missing_barrier_shows(name, tmp_path):
        """In every order of the warps; the plain interpreter does not notice."""
        with planted(BUGS[name], tmp_path):
            assert_right(problem(45, 70, 16), MEASURED, multiprocessors=1)
            for seed in range(3):
                with apart(seed), pytest.raises(AssertionError, match="of column"):
                    assert_right(problem(45, 70, 16), MEASURED, multiprocessors=1)
