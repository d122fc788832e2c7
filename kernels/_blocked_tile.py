"""Pieces of the blocked implementation: tiles of the logit matrices, and matrix products.

A product of bfloat16 features comes out of a CPU's matmul rounded to bfloat16, so logits carry 8 bits
there, as they do in torch's own operations under autocast; everything after the product is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ._blocked_positives import COL, ROW, Positives
from ._processor import bfloat16_unit, mkl_knows_this_processor
from .contrastive import Inputs, Options, accumulation_dtype, teacher_factor

# Largest tile. Small enough that the tiles of the four logit matrices stay in the last-level cache,
# large enough that products and per-operation costs are efficient (see benchmarks/losses.py).
ROWS, COLS = 512, 1024

# Base-2 bounds around the shared reference c. x − c <= HIGHEST leaves room in float32 for 2**26 summands
# and their product with a logit. A sum of 2**(x − c) is exact while it is at least 2**LOWEST: whatever
# underflows (below 2**-126) is then less than 2**-40 of it, for any number of columns up to 2**26.
HIGHEST, LOWEST, SUMMANDS = 88.0, -60.0, 26.0

LOG2E = math.log2(math.e)

# The logit matrices and the directions in which their softmax is taken.
SOFTMAX_DIRECTIONS = {"z": (ROW, COL), "s": (ROW, COL), "t": (ROW, COL), "a": (ROW,), "b": (COL,)}

# What is subtracted from the logits of a matrix before the exponential: a number for each row or column, or one.
References = Mapping[str, "Tensor | float"]


class Plan(NamedTuple):
    """Which matrices are visited, the teacher's first, and what is taken from each."""

    matrices: tuple[str, ...]
    kl: tuple[str, ...]  # matrices whose divergence from t is measured
    targets: tuple[str, ...]  # matrices whose sum over the positives is measured
    stats: bool
    directions: tuple[int, ...]  # of the softmaxes: ROW, and COL if anything is asked of the columns

    @classmethod
    def of(cls, options: Options, has_teacher: bool, stats: bool) -> Plan:
        """Return the plan of a pass that measures the diagnostics if ``stats``."""
        stats_of_teacher = stats and has_teacher
        crossed = ("a",) if options.one_way else ("a", "b")
        return cls(
            matrices=("t",) * (options.relational or options.cross or stats_of_teacher)
            + ("s",) * (options.contrastive or options.relational or stats)
            + crossed * options.crossed,
            kl=("s",) * (options.relational or stats_of_teacher) + crossed * options.cross,
            targets=("s",) * options.contrastive + crossed * options.interactive,
            stats=stats,
            directions=(ROW,) if options.one_way else (ROW, COL),
        )


def _blocks(length: int, size: int) -> Iterator[slice]:
    """Yield slices of at most ``size`` that cover ``length``."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


class Logits:
    """The matrices s, t, a, b of a rectangle times ``unit``, tile by tile, in the accumulation dtype.

    The unit log2 e makes exponentials to the base 2. With ``keep`` each tile has memory of its own.
    """

    def __init__(self, inputs: Inputs, options: Options, unit: float = LOG2E, keep: bool = False) -> None:
        image, factor = inputs.image, teacher_factor(inputs, options)
        self.n, self.m = len(image), len(inputs.text)
        self.dtype = accumulation_dtype(image)
        self.scale = inputs.logit_scale.to(self.dtype)
        self.has_teacher, self.has_margin = inputs.has_teacher, options.margin > 0
        self.shift = self.scale * (options.margin * unit)  # what the margin adds to a negative, σδ
        operand = _operand_dtype(image)
        features = {"u": image, "v": inputs.text, "tu": inputs.teacher_image, "tv": inputs.teacher_text}
        self.operands = {k: x.detach().to(operand).contiguous() for k, x in features.items() if x is not None}
        kappa = self.scale * unit
        self._factors = {"s": ("u", "v", kappa)}
        if factor is not None:
            self._factors |= {
                "a": ("u", "tv", kappa),
                "b": ("tu", "v", kappa),
                "t": ("tu", "tv", factor * unit),
            }
        self._keep, self._rooms = keep, dict[str, Tensor]()
        self._scaled_rows: tuple[slice, dict[tuple[str, Tensor], Tensor]] = (slice(0, 0), {})

    def tile(self, name: str, at_rows: slice, at_cols: slice) -> Tensor:
        """Return a tile of matrix ``name``; unless all are kept, it is valid until the next of that name."""
        left, right, kappa = self._factors[name]
        if self._scaled_rows[0] != at_rows:
            self._scaled_rows = (at_rows, {})
        # The left operand carries the scale, one block of rows at a time. Rounding it once more, in low
        # precision, is lost in the rounding of the product.
        key = (left, kappa)
        if key not in self._scaled_rows[1]:
            block = self.operands[left][at_rows]
            self._scaled_rows[1][key] = (block.to(self.dtype) * kappa).to(block.dtype)
        room = partial(self._room, name, at_rows, at_cols)
        return product(self._scaled_rows[1][key], self.operands[right][at_cols], room)

    def _room(self, name: str, at_rows: slice, at_cols: slice) -> Tensor:
        """Return memory for a tile, used again for the next of that name: fresh memory would cost time."""
        height, width = at_rows.stop - at_rows.start, at_cols.stop - at_cols.start
        if self._keep:
            return self.scale.new_empty(height, width)
        if name not in self._rooms:
            self._rooms[name] = self.scale.new_empty(self.tile_size)
        return self._rooms[name][: height * width].view(height, width)

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Yield the rows and columns of every tile, row by row."""
        for at_rows in self.row_blocks():
            for at_cols in self.col_blocks():
                yield at_rows, at_cols

    def row_blocks(self) -> Iterator[slice]:
        """Yield the rows of each row of tiles."""
        return _blocks(self.n, ROWS)

    def col_blocks(self) -> Iterator[slice]:
        """Yield the columns of each column of tiles."""
        return _blocks(self.m, COLS)

    @property
    def tile_size(self) -> int:
        """Entries of the largest tile."""
        return min(ROWS, self.n) * min(COLS, self.m)

    def shared_references(self) -> dict[str, float]:
        """Return one constant c for each matrix such that x − c <= HIGHEST for unit vectors."""
        shared = {name: max(0.0, float(kappa) - HIGHEST) for name, (_, _, kappa) in self._factors.items()}
        return {**shared, "z": shared["s"]}

    def row_totals(self) -> Tensor:
        """Return Σ_j s_ij, [N], without the matrix."""
        u, v, kappa = self._factors["s"]
        return self.operands[u].to(self.dtype) @ (kappa * self.operands[v].sum(0, dtype=self.dtype))

    def col_totals(self) -> Tensor:
        """Return Σ_i s_ij, [M], without the matrix."""
        u, v, kappa = self._factors["s"]
        return self.operands[v].to(self.dtype) @ (kappa * self.operands[u].sum(0, dtype=self.dtype))


class Tile:
    """One tile of every logit matrix and of the exponentials exp2(x − reference), each made once.

    With shared references (one constant for each matrix) rows and columns share their exponentials, which
    then take the place of the logits except of those in ``keep``.
    """

    def __init__(
        self,
        logits: Logits,
        positives: Positives,
        at_rows: slice,
        at_cols: slice,
        row_references: References,
        col_references: References,
        keep: tuple[str, ...] = (),
    ) -> None:
        self._keep = keep
        self._logits, self._at = logits, (at_cols, at_rows)
        self._references = (col_references, row_references)
        self.shared = row_references is col_references
        self.positives = positives.tile(at_rows, at_cols)
        self._made: dict[tuple[str, ...], Tensor] = {}

    def at(self, direction: int) -> slice:
        """Return the part of the rows (columns) that the tile covers."""
        return self._at[direction]

    def x(self, name: str) -> Tensor:
        """Return the logits in base 2."""
        key = ("x", name)
        if key not in self._made:
            if name == "z":
                z = self.x("s") + self._logits.shift
                if self.positives:
                    self.positives.put_(z, self.at_positives(self.x("s")))
                self._made[key] = z
            else:
                self._made[key] = self._logits.tile(name, self._at[ROW], self._at[COL])
        return self._made[key]

    def e(self, name: str, direction: int) -> Tensor:
        """Return exp2(x − reference)."""
        key = ("e", name) if self.shared else ("e", name, str(direction))
        if key not in self._made:
            x, reference = self.x(name), self._references[direction][name]
            if isinstance(reference, Tensor):
                x = x - self.spread(reference, direction)
            elif name in self._keep:
                x = x - reference
            else:
                del self._made["x", name]
                x = x.sub_(reference) if reference else x
            self._made[key] = x.exp2_()
        return self._made[key]

    def x_at_positives(self, name: str) -> Tensor:
        """Return the logits of the positives."""
        key = ("x_at_positives", name)
        if key not in self._made:
            self._made[key] = self.at_positives(self.x(name))
        return self._made[key]

    def e_at_positives(self, name: str, direction: int) -> Tensor:
        """Return the exponentials of the positives, as they were before anything was written over them."""
        key = ("e_at_positives", name) if self.shared else ("e_at_positives", name, str(direction))
        if key not in self._made:
            self._made[key] = self.at_positives(self.e(name, direction))
        return self._made[key]

    def gap(self, name: str, direction: int) -> Tensor:
        """Return exp2(t − reference) (t − x)."""
        key = ("gap", name) if self.shared else ("gap", name, str(direction))
        if key not in self._made:
            self._made[key] = (self.x("t") - self.x(name)).mul_(self.e("t", direction))
        return self._made[key]

    def spread(self, values: Tensor, direction: int) -> Tensor:
        """Return the tile's part of a vector over the rows (columns), ready to be broadcast."""
        return values[self._at[direction]].unsqueeze(direction)

    def at_positives(self, tile: Tensor) -> Tensor:
        """Return the values of a tile at its positives."""
        assert self.positives is not None
        return self.positives.take(tile)


# ---------------------------------------------------------------------------------------------------
# Products.


def product(a: Tensor, b: Tensor, room: Callable[[], Tensor]) -> Tensor:
    """Return a @ b.T, in ``room()`` if that saves memory; a [m, k] and b [n, k] row-contiguous or transposed."""
    if _mkldnn_is_faster(a):  # which can't write into memory that is there
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    out = room()
    return torch.mm(a, b.T, out=out) if out.dtype == a.dtype else out.copy_(a @ b.T)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b.T to ``total``, by the same library as :func:`product`."""
    if _mkldnn_is_faster(a):
        total += torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    elif total.dtype != a.dtype:
        total += a @ b.T
    else:
        total.addmm_(a, b.T)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ a∘b of two matrices in float64, a block at a time so that no product of their size is stored."""
    sums = [(a[at] * b[at]).sum(dtype=torch.float64) for at in _blocks(len(a), ROWS)]
    return torch.stack(sums).sum()


def _operand_dtype(image: Tensor) -> torch.dtype:
    """Return the dtype of the products.

    float16 is widened: its gradient tiles (about 1/N²) would underflow. So is bfloat16 on a CPU that has
    no instructions for it, where it would only be slower.
    """
    if image.dtype == torch.float16:
        return torch.float32
    if image.dtype == torch.bfloat16 and image.device.type == "cpu" and bfloat16_unit() is None:
        return torch.float32
    return image.dtype


def _mkldnn_is_faster(a: Tensor) -> bool:
    return a.dtype == torch.float32 and a.device.type == "cpu" and not mkl_knows_this_processor()
