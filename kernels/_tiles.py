"""Tile sizes of each kernel on each architecture, and the choice among them.

**Tiles.** The table is fixed, so that runs repeat and ranks agree; every entry is compiled ahead of time by
``benchmarks/machine_code.py`` and must not spill a register. ``TRACER_AUTOTUNE=1`` times an architecture's
tiles on the first call of a size instead, and prints the choice once per kernel and size. (Another tile
sums in another order: results then agree to rounding, not bit for bit.)

**Which entry.** Of the tiles that do not spill, the largest of an entry takes the fewest clocks per logit by
what ``benchmarks/visits.py`` counts in its machine code and ``benchmarks/roofline.py`` makes of it. Fewer warps
often win: each then has more of a tile, exchanges less with the others, and repeats no product.

**Small batches.** Work is dealt out in tiles, so a GPU is busy only if there are as many tiles as
multiprocessors. N = M = 512 has 64 tiles of 64×64, half of an H100's 132 multiprocessors, but 256 of
32×32, and 256×256 has 64 of those. So each entry lists tiles from large (fewer operand reads) to small,
and the first that gives nine multiprocessors in ten a tile is taken, else the smallest. Below that, splitting
gains nothing: 256×256 at D 512 is 4·2·256²·512 = 0.27 GFLOP, a microsecond of one tenth of the chip,
less than the launch.

**Wide features.** D is the inner loop only: registers and scratch do not depend on it, and operand
traffic per product does not either. A visit of an n×m tile reads 2(n+m)·D operands for 4·n·m·D
multiply-adds (the full objective), in 16 bits 2·n·m/(n+m) FLOP per byte: 43 for 32×64, and n·m/(n+m) =
51 for one product at 256×64, all from the second-level cache, where a row of rectangles shares its
operands. So D 1024 and 1280 use the same tiles as D 512 and only take longer, and the share of the
elementwise work, which is independent of D, falls.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import current_device, gpu, triton


class Tile(NamedTuple):
    """Size of a tile in rows, columns and features; warps of a program and stages of its load pipeline."""

    block_n: int
    block_m: int
    block_d: int
    num_warps: int
    num_stages: int


# Rows (or columns) merged at a time by the combine kernel, one program each.
COMBINE = Tile(64, 0, 0, 2, 1)
# Columns whose parked statistics a program of the forward kernel merges at a time.
MERGE = 128

Tiles = dict[str, tuple[Tile, ...]]
Table = dict[tuple[str, bool, int], tuple[Tile, ...]]


def _table(tiles_16: Tiles, tiles_19: Tiles, tiles_32: Tiles) -> Table:
    """Key the tiles, large to small, by kernel, more than one product, and bits of an operand (see ``_bits``)."""
    return {
        (kernel.removesuffix(", one product"), "one product" not in kernel, bits): tiles
        for bits, table in ((16, tiles_16), (19, tiles_19), (32, tiles_32))
        for kernel, tiles in table.items()
    }


# Kernels that take the tiles of another one where a table names none for them. Plain ones have one product and
# neither labels nor margin nor smoothing: the CLIP loss, whose few registers allow larger tiles.
LIKE = {
    "sigmoid": "backward",
    **{f"{kernel}, {form}": kernel for kernel in ("forward", "backward") for form in ("one way", "plain")},
}


def tiles_of(table: Table, kernel: str, many: bool, bits: int) -> tuple[Tile, ...]:
    """Return the tiles of a kernel with several products or one, on operands of so many bits."""
    own = table.get((kernel, many, bits))
    return table[LIKE.get(kernel, kernel), many, bits] if own is None else own


def _everywhere(*tiles: Tile) -> Tiles:
    """Give every kernel the same tiles."""
    kernels = ("forward", "forward with stats", "backward")
    return {name: tiles for kernel in kernels for name in (kernel, f"{kernel}, one product")}


# Exact float32 products are FFMA on NVIDIA, so these kernels are bound by arithmetic whatever the tile. TF32,
# where torch allows it, takes the same tiles unless they would spill.
_FLOAT32 = _everywhere(Tile(32, 32, 32, 4, 2)) | {
    "forward, one product": (Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2)),
    "backward, one product": (Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2)),
}
_TINY = Tile(32, 32, 64, 4, 3)
_ONE_WARP = Tile(32, 32, 32, 1, 3)  # of gfx942, whose warps would repeat the one product that a small tile is

TABLES: dict[str, Table] = {
    "sm_80": _table(
        {
            "forward": (Tile(32, 64, 64, 4, 3), _TINY),
            "forward with stats": (Tile(32, 64, 64, 8, 3), Tile(32, 16, 32, 8, 2)),
            "backward": (Tile(128, 32, 64, 8, 3), Tile(64, 32, 64, 4, 3), Tile(32, 32, 64, 8, 3)),
            "forward, one product": (Tile(64, 64, 64, 8, 3), _TINY),
            "forward with stats, one product": (Tile(64, 32, 32, 8, 3), _TINY),
            "backward, one product": (Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3), _TINY),
            "sigmoid": (Tile(32, 32, 64, 4, 3),),
            "sigmoid, one product": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 64, 4, 3), _TINY),
            "forward, plain, one product": (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), _TINY),
            "backward, plain, one product": (Tile(256, 64, 64, 8, 3), Tile(128, 64, 64, 4, 3), _TINY),
        },
        _FLOAT32
        | {
            "forward with stats": (Tile(32, 16, 32, 8, 2),),
            "sigmoid, one product": (Tile(64, 64, 32, 4, 2), Tile(32, 32, 32, 4, 2)),
        },
        _FLOAT32
        | dict.fromkeys(
            ("forward", "forward with stats", "backward", "forward with stats, one product"),
            (Tile(32, 32, 16, 8, 2),),
        )
        | {"sigmoid, one product": (Tile(64, 64, 32, 8, 2), Tile(32, 32, 16, 4, 2))},
    ),
    "sm_90": _table(
        {
            "forward": (Tile(32, 64, 64, 4, 3), _TINY),
            "forward with stats": (Tile(64, 32, 32, 8, 2),),
            "backward": (Tile(64, 64, 64, 8, 3), _TINY),
            "forward, one product": (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3), _TINY),
            "forward with stats, one product": (Tile(64, 64, 64, 8, 3), _TINY),
            "backward, one product": (Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3), _TINY),
            "forward, one way": (Tile(64, 64, 32, 8, 3), Tile(32, 32, 32, 4, 3)),
            "sigmoid, one product": (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3), _TINY),
            "forward, plain, one product": (
                Tile(256, 64, 64, 8, 3),
                Tile(128, 64, 64, 4, 3),
                Tile(64, 64, 64, 4, 3),
                _TINY,
            ),
            "backward, plain, one product": (
                Tile(128, 128, 64, 8, 3),
                Tile(128, 64, 64, 8, 3),
                Tile(64, 64, 64, 4, 3),
                _TINY,
            ),
        },
        _FLOAT32
        | {
            "forward with stats": (Tile(32, 16, 32, 8, 2),),
            "backward": (Tile(32, 32, 32, 8, 2),),
            "backward, one product": (Tile(64, 64, 32, 8, 2), Tile(64, 32, 32, 8, 2)),
            "sigmoid": (Tile(32, 32, 32, 4, 2),),
        },
        _FLOAT32
        | {
            "forward with stats": (Tile(32, 32, 32, 8, 2),),
            "forward with stats, one product": (Tile(32, 32, 32, 8, 2),),
            "backward, one product": (Tile(64, 32, 16, 8, 2), Tile(32, 32, 32, 4, 2)),
            "forward, one way, one product": (Tile(64, 32, 32, 8, 2), Tile(32, 32, 32, 4, 2)),
        },
    ),
    "sm_100": _table(
        {
            "forward": (Tile(64, 64, 64, 8, 3), Tile(64, 32, 64, 8, 3), Tile(32, 16, 64, 4, 3)),
            "forward with stats": (Tile(32, 64, 64, 8, 3), Tile(64, 32, 32, 8, 2)),
            "backward": (Tile(64, 64, 64, 8, 3), Tile(64, 32, 32, 8, 3), _TINY),
            "forward, one product": (Tile(64, 64, 64, 4, 3), _TINY),
            "forward with stats, one product": (_TINY,),
            "backward, one product": (
                Tile(128, 64, 64, 8, 3),
                Tile(64, 64, 64, 4, 3),
                Tile(32, 32, 64, 4, 2),  # three stages spill
            ),
            "forward, one way": (Tile(32, 32, 64, 8, 3), Tile(32, 16, 64, 4, 3)),
            "forward, one way, one product": (Tile(64, 64, 64, 8, 3), _TINY),
            "forward, plain, one product": (Tile(128, 64, 32, 4, 3), Tile(64, 64, 64, 8, 3), _TINY),
        },
        {},  # several products spill in TF32, so float32 stays exact here
        _FLOAT32
        | {
            "forward with stats": (Tile(32, 32, 32, 8, 2),),
            "backward": (Tile(32, 32, 32, 8, 2),),
            "backward, one product": (Tile(64, 32, 16, 8, 2), Tile(32, 32, 32, 4, 2)),
            "sigmoid": (Tile(32, 32, 32, 4, 2),),
            "forward, one way": (Tile(32, 32, 32, 8, 2),),
            "forward, one way, one product": (Tile(64, 32, 32, 8, 2), Tile(32, 32, 32, 4, 2)),
        },
    ),
    "gfx942": _table(
        {
            "forward": (Tile(64, 64, 32, 4, 3), _ONE_WARP),
            "forward with stats": (Tile(64, 64, 32, 4, 3), _ONE_WARP),
            "backward": (Tile(64, 64, 32, 4, 3), _ONE_WARP),
            "forward, one product": (Tile(64, 128, 32, 4, 3), Tile(64, 64, 32, 4, 3), _ONE_WARP),
            "forward with stats, one product": (Tile(64, 128, 32, 4, 3), _ONE_WARP),
            "backward, one product": (Tile(128, 128, 64, 8, 3), Tile(128, 64, 32, 8, 3), _ONE_WARP),
            "sigmoid": (Tile(64, 64, 32, 4, 3), _ONE_WARP),
            "forward, plain, one product": (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), _ONE_WARP),
        },
        _FLOAT32,
        _FLOAT32,
    ),
    # An architecture nobody has looked at: small enough to fit anywhere.
    "fallback": _table(_everywhere(Tile(32, 32, 32, 4, 2)), {}, _everywhere(Tile(32, 32, 32, 4, 2))),
    "interpreter": _table(*3 * (_everywhere(Tile(64, 64, 64, 4, 1), Tile(32, 32, 32, 4, 1)),)),
}


# sm_86, sm_89 and sm_120 have sm_80's instructions and two thirds of its shared memory, which suffices.
_SAME_AS = {"sm_120": "sm_80"}


def _table_of(device: torch.device) -> Table:
    """Return the tiles of a device's architecture; one that has no tiles of its own takes ``fallback``."""
    name = gpu(device).architecture
    return TABLES.get(_SAME_AS.get(name, name), TABLES["fallback"])


def _bits(image: Tensor) -> int:
    """Return how many bits of an operand a product sees: 16, 32, or 19 of float32's where torch allows TF32.

    An architecture without TF32 tiles multiplies exactly whatever torch allows.
    """
    if image.element_size() == 2:
        return 16
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"  # the older flags set it too
    return 19 if allowed and ("forward", True, 19) in _table_of(image.device) else 32


def precision(image: Tensor) -> str:
    """Return Triton's ``input_precision`` for the products of a batch: ``"tf32"`` or ``"ieee"``."""
    return "tf32" if _bits(image) == 19 else "ieee"


def choose(kernel: str, products: int, image: Tensor, M: int, run: Callable[[Tile], object]) -> Tile:
    """Return the tile for ``kernel`` on images [N, D] against M texts.

    Args:
        kernel: ``"forward"``, ``"forward with stats"``, ``"backward"`` or one of ``LIKE``.
        products: how many logit matrices the kernel multiplies.
        image: image features [N, D].
        M: number of texts.
        run: runs the pass with a given tile; a search times it.
    """
    N, (architecture, multiprocessors) = len(image), gpu(image.device)
    tiles = tiles_of(_table_of(image.device), kernel, products > 1, _bits(image))
    if os.environ.get("TRACER_AUTOTUNE") == "1" and architecture != "interpreter":
        return _search(kernel, products, image, M, tiles, run)
    return _filling(tiles, N, M, multiprocessors)


@lru_cache
def _filling(tiles: tuple[Tile, ...], N: int, M: int, multiprocessors: int) -> Tile:
    """Return the first tile that gives nearly every multiprocessor work, else the last."""
    enough = 0.9 * multiprocessors
    return next((t for t in tiles if cdiv(N, t.block_n) * cdiv(M, t.block_m) >= enough), tiles[-1])


def cdiv(a: int, b: int) -> int:
    """Return ⌈a / b⌉. Triton's own is made for kernels, and takes ten microseconds a call outside them."""
    return -(-a // b)


_fastest: dict[tuple[object, ...], Tile] = {}


def _search(
    kernel: str, products: int, image: Tensor, M: int, tiles: tuple[Tile, ...], run: Callable[[Tile], object]
) -> Tile:
    """Return the fastest of ``tiles``, timed once per kernel and size (rounded up to powers of two)."""
    N, D = image.shape
    sizes = triton.next_power_of_2(N), triton.next_power_of_2(M), D
    key = kernel, products, image.dtype, precision(image), image.device, sizes
    if key not in _fastest:
        with current_device(
            image
        ):  # the clock's events and the caches that it empties are those of one device
            times = {tile: _milliseconds(run, tile) for tile in tiles}
        _fastest[key] = min(times, key=lambda tile: times[tile])
        shown = ", ".join(f"{tuple(tile)} {ms:.3f} ms" for tile, ms in times.items())
        print(
            f"tracer: {kernel}, {products} products, {sizes}: {tuple(_fastest[key])} of {shown}",
            file=sys.stderr,
        )
    return _fastest[key]


def _milliseconds(run: Callable[[Tile], object], tile: Tile) -> float:
    return float(triton.testing.do_bench(lambda: run(tile)))
