"""How the logit matrix is cut into programs, and the backward pass into strips of gradient rows.

**Rectangles.** A rectangle of r×c tiles makes one program; programs make a grid of about √P × √P, so partial
statistics are √P × (N + M), not N²/tile. Of all grids of at most two programs per multiprocessor, the one with
the shortest last finisher is taken, ⌈programs / multiprocessors⌉ · r · c tiles; among equals the one with the
fewest partials. N = 4096 with 64×64 tiles on 132 multiprocessors: 4096 tiles, rectangles of 8×4, 128 programs,
97 % busy.

**Strips.** The backward pass writes the gradients of a strip of logit rows, all M columns wide, to scratch for the
matrix products that finish it. The bound on this scratch grows with the features, not with N·M.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from ._tiles import Tile, cdiv

# Least bound on the gradient strips of the backward pass, in bytes. Larger strips make fewer, fuller matrix
# products; below the size of a GPU's second-level cache they need not reach its memory.
STRIP_BYTES = 64 << 20


class Grid(NamedTuple):
    """The cut of an N×M matrix: each program of the grid walks one rectangle of whole tiles."""

    tile: Tile
    tiles: tuple[int, int]  # of the matrix, along its rows and along its columns
    rectangle: tuple[int, int]  # of one program, in tiles
    programs: tuple[int, int]

    @property
    def rows(self) -> int:
        """Return the number of logit rows of a rectangle."""
        return self.rectangle[0] * self.tile.block_n

    @property
    def cols(self) -> int:
        """Return the number of logit columns of a rectangle."""
        return self.rectangle[1] * self.tile.block_m

    def busy(self, multiprocessors: int) -> float:
        """Return the share of the multiprocessors' time that is filled until the last program ends."""
        waves = cdiv(math.prod(self.programs), multiprocessors)
        return math.prod(self.tiles) / (multiprocessors * waves * math.prod(self.rectangle))


@lru_cache
def plan(N: int, M: int, tile: Tile, multiprocessors: int) -> Grid:
    """Return the cut of N×M logits into programs for ``tile`` on so many multiprocessors."""
    tiles_n, tiles_m = cdiv(N, tile.block_n), cdiv(M, tile.block_m)
    rows, cols = rectangle(tiles_n, tiles_m, multiprocessors)
    return Grid(tile, (tiles_n, tiles_m), (rows, cols), (cdiv(tiles_n, rows), cdiv(tiles_m, cols)))


@lru_cache
def rectangle(tiles_n: int, tiles_m: int, multiprocessors: int) -> tuple[int, int]:
    """Return a program's rectangle in tiles: the soonest last finisher, then the fewest partial statistics."""
    best = (float("inf"), float("inf"))
    size = (tiles_n, tiles_m)
    for grid_n in range(1, min(tiles_n, 2 * multiprocessors) + 1):
        rows = cdiv(tiles_n, grid_n)
        for waves in (1, 2):
            cols = cdiv(tiles_m, max(1, min(tiles_m, waves * multiprocessors // grid_n)))
            programs_n, programs_m = cdiv(tiles_n, rows), cdiv(tiles_m, cols)
            finish = cdiv(programs_n * programs_m, multiprocessors) * rows * cols
            cost = (finish, programs_n * tiles_m + programs_m * tiles_n)
            if cost < best:
                best, size = cost, (rows, cols)
    return size


class Strips(NamedTuple):
    """The cut of the backward pass: strips of ``height`` rows of ``stride`` elements, whole tiles, in scratch."""

    height: int
    stride: int
    starts: range  # first row of each strip


@lru_cache
def strips(
    N: int, M: int, D: int, tile: Tile, matrices: int, itemsize: int, strip_bytes: int | None = None
) -> Strips:
    """Return the strips of a backward pass.

    Args:
        N, M, D: images, texts and their width.
        tile: of the backward kernel; a strip has whole rows of tiles, and one at least.
        matrices: how many gradient matrices a strip holds. Without any, one strip takes all rows.
        itemsize: bytes of an element.
        strip_bytes: bound on the scratch in bytes; by default :func:`strip_bound`.
    """
    bound = strip_bound(N, M, D) if strip_bytes is None else strip_bytes
    stride = cdiv(M, tile.block_m) * tile.block_m
    if not matrices:
        return Strips(N, stride, range(0, N, N))
    tile_rows = max(1, bound // (matrices * stride * itemsize) // tile.block_n)
    height = min(tile_rows * tile.block_n, N)
    return Strips(height, stride, range(0, N, height))


def strip_bound(N: int, M: int, D: int) -> int:
    """Return the default bound in bytes: as large as the float32 gradients of the features, where that is more.

    ∂L/∂v is summed over strips, so each strip reads and writes all of it. With a fixed bound their number would
    grow by N², and that traffic by N³.
    """
    return max(STRIP_BYTES, 4 * (N + M) * D)
