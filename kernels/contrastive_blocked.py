"""The contrastive objective tile by tile in torch operations: bounded memory, made for CPUs.

The same walk as the GPU kernels (``contrastive_triton``); the definition is ``contrastive_eager``. The N×M logit
matrices are visited in tiles; a tile yields everything that any term needs from it and is forgotten.
Backward computes the tiles once more from the saved log-sum-exps. Nothing quadratic is ever stored:
memory is O((N + M)·D) plus a few tiles.

What makes it fast, in order of weight:

* work: 4 products forward and 8 backward for the whole objective, 1 and 3 for the CLIP loss;
* products of float32 features go to oneDNN on processors that are not Intel's, where torch would ask MKL;
* one exponential per logit matrix. exp(x − c) with one constant c serves the row *and* the column
  softmax as long as no log-sum-exp lies too far below c. That is checked on the sums; where it fails
  (wild logits) a second walk takes the exact maxima of rows and columns as references instead;
* the margin needs no exponential of its own: it multiplies the negatives by exp(σδ);
* label smoothing is a constant per row plus one per column, so its part of loss and gradients has
  rank one and never touches a tile;
* positives are lists of positions where they are few, masks where a tile has many (few large classes);
* base-2 exponentials, because torch's exp goes to MKL too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from . import _statistics
from ._blocked_gradients import GradientWalk, slopes
from ._blocked_positives import COL, ROW, Positives, TilePositives
from ._blocked_tile import LOWEST, SOFTMAX_DIRECTIONS, Logits, Plan, References, Tile
from ._statistics import Side, Whole
from .contrastive import TERMS, Forward, Gradients, Inputs, Needs, Options, Saved


def forward(inputs: Inputs, options: Options) -> Forward:
    """Return terms, statistics and diagnostics, in float64 for float64 features and else in float32."""
    logits = Logits(inputs, options)
    rows, cols = _walk(logits, inputs, options)
    return _statistics.result(rows, cols, logits.shift, options, Whole(logits.n, logits.m))


def statistics(inputs: Inputs, options: Options) -> tuple[Side, Side]:
    """Return the statistics of the rows and of the columns of a rectangle; see ``_statistics``.

    If nothing is asked of the columns, they have none.
    """
    return _walk(Logits(inputs, options), inputs, options)


def backward(
    grad_terms: Tensor,
    inputs: Inputs,
    saved: Saved,
    options: Options,
    needs: Needs,
    whole: Whole | None = None,
    weights: Tensor | None = None,
) -> Gradients:
    """Return the gradients of ``grad_terms · terms``.

    ``saved`` are the final statistics of whole rows and columns of a matrix of size ``whole``, of which the inputs
    may be a rectangle. ``weights`` [2] is what a row and a column weigh in a term, by default in the matrix that
    the inputs are the whole of.
    """
    logits, plan = Logits(inputs, options), Plan.of(options, inputs.has_teacher, stats=False)
    whole = Whole(logits.n, logits.m) if whole is None else whole
    weights = _statistics.weights_of(saved, options, whole) if weights is None else weights
    sides = slopes(grad_terms, saved, logits, options, plan, whole, weights)
    walk = GradientWalk(inputs, logits, sides, options, plan, needs)
    for at_rows in logits.row_blocks():
        walk.visit(at_rows)
    return walk.gradients()


def keeps(n: int, m: int, width: int) -> bool:
    """Return whether a matrix [n, m] may be kept: of 4 MiB in float32, or as large as features and gradients."""
    return n * m <= max(2**20, 2 * (n + m) * width)


def at_once(inputs: Inputs, options: Options, needs: Needs) -> tuple[Forward, Gradients] | None:
    """Return the result of :func:`forward` and the gradients of its contrastive term; None where that won't do.

    A small matrix is kept between the two walks, so that each product and each exponential is taken once. The
    gradients, in the accumulation dtype, wait for their upstream gradient; several terms would have several.
    """
    if not (options.alone and keeps(len(inputs.image), *inputs.text.shape) and any(needs)):
        return None
    logits, plan = Logits(inputs, options, keep=True), Plan.of(options, has_teacher=False, stats=False)
    positives, shared = Positives(inputs, logits.dtype), logits.shared_references()
    tiles = {
        (at_rows.start, at_cols.start): Tile(logits, positives, at_rows, at_cols, shared, shared)
        for at_rows, at_cols in logits.tiles()
    }
    sides = _sums(logits, positives, plan, (shared, shared), tiles.values())
    if not all(side.exact for side in sides):
        return None
    whole = Whole(logits.n, logits.m)
    rows, cols = _statistics_of(sides, logits, positives, plan, options)
    result = _statistics.result(rows, cols, logits.shift, options, whole)
    weights = _statistics.weights_of(result.saved, options, whole)
    upstream = logits.scale.new_ones(len(TERMS))
    back = slopes(upstream, result.saved, logits, options, plan, whole, weights)
    if isinstance(back[0].references["s"], Tensor):  # the exponentials would have to be taken again
        return None
    walk = GradientWalk(inputs, logits, back, options, plan, needs, tiles, logits.dtype)
    for at_rows in logits.row_blocks():
        walk.visit(at_rows)
    return result, walk.gradients()


# ---------------------------------------------------------------------------------------------------
# Forward: sums of rows and columns.


class Sums:
    """Sums over every row (direction 1) or every column (direction 0) of a rectangle, filled tile by tile."""

    def __init__(self, direction: int, positives: Positives, references: References) -> None:
        self._direction = direction
        self.positives = positives.counts[direction]
        self._references = references
        self._sums: dict[str, Tensor] = {}
        self._best: dict[str, tuple[Tensor, Tensor]] = {}
        self._lse: dict[str, Tensor] = {}
        self.exact = False

    def __getitem__(self, name: str) -> Tensor:
        """Return a sum, 0 where nothing was added; those of exponentials are relative to the references."""
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(self.positives)
        return self._sums[name]

    def visit(self, tile: Tile, plan: Plan, margin: bool) -> None:
        """Add what a tile has for these rows (columns)."""
        mine, positives = self._direction, tile.positives
        for name in plan.matrices:
            if mine not in SOFTMAX_DIRECTIONS[name]:
                continue
            if name in plan.kl:
                self._reduce(f"kl/{name}", tile, tile.gap(name, mine))
            if name in plan.targets and positives:
                self._add(f"positive/{name}", positives, tile.x_at_positives(name))
            e = tile.e(name, mine)
            if plan.stats and name in ("s", "t"):
                self._track_best(name, tile)
                self._reduce(f"first/{name}", tile, e * tile.x(name))
            if name != "s" or not (margin and tile.shared):
                self._reduce(name, tile, e)
            if name == "s" and margin and not tile.shared:
                self._reduce("z", tile, tile.e("z", mine))
            if positives and ((name == "s" and (margin or plan.stats)) or (name == "t" and plan.stats)):
                self._add(f"mass/{name}", positives, tile.e_at_positives(name, mine))

    def visit_negatives(self, tile: Tile) -> None:
        """Add the negatives alone. Their exponentials are what is left of s afterwards."""
        e = tile.e("s", self._direction)
        if tile.positives:
            tile.positives.put_(e, 0.0)
        self._reduce("negative", tile, e)

    def _reduce(self, name: str, tile: Tile, values: Tensor) -> None:
        self[name][tile.at(self._direction)] += values.sum(self._direction)

    def _add(self, name: str, positives: TilePositives, values: Tensor) -> None:
        positives.add_to(self[name], values, self._direction)

    def _track_best(self, name: str, tile: Tile) -> None:
        if name not in self._best:
            place = torch.zeros_like(self.positives).long()
            self._best[name] = torch.full_like(self.positives, -math.inf), place
        value, place = self._best[name]
        at, offset = tile.at(self._direction), tile.at(1 - self._direction).start
        new, where = tile.x(name).max(self._direction)
        place[at] = torch.where(new > value[at], where + offset, place[at])
        value[at] = torch.maximum(new, value[at])

    def close(self, shift: Tensor) -> None:
        """Turn the sums into log-sum-exps and judge whether the references served."""
        if "negative" in self._sums:
            self._sums["s"] = self["negative"] + self["mass/s"]
        logs = {name: self._sums[name].log2() for name in SOFTMAX_DIRECTIONS if name in self._sums}
        checked = dict(logs)
        if "negative" in self._sums:
            logs["z"] = torch.logaddexp2(self["negative"].log2() + shift, self["mass/s"].log2())
            checked["z"] = logs["z"] - shift
        low, high = torch.cat(list(checked.values())).aminmax()
        # A sum whose summands carry a logit as factor overflows before the plain one does.
        weighted = [x for name, x in self._sums.items() if name.startswith(("kl/", "first/"))]
        finite = not weighted or bool(torch.cat(weighted).isfinite().all())
        self.exact = finite and bool(low >= LOWEST) and bool(high < math.inf)
        for name, log in logs.items():
            self._lse[name] = log + self._references[name]

    def statistics(self, positives: Positives, plan: Plan, totals: Tensor | None) -> Side:
        """Return the statistics that the sums make; ``totals`` are the sums of s over all pairs, where needed."""
        side: Side = {"positives": self.positives}
        if totals is not None:
            side["total_s"] = totals
        for matrix, log in self._lse.items():
            x = "x" if matrix in ("a", "b") else matrix
            side[f"lse_{x}"] = log
            if matrix in plan.targets:
                side[f"positive_{x}"] = self[f"positive/{matrix}"]
            if matrix in plan.kl:
                side[f"gap_{x}"] = self[f"kl/{matrix}"] / self["t"]
            if matrix in self._best:
                best, arg = self._best[matrix]
                side[f"mean_{matrix}"] = self[f"first/{matrix}"] / self[matrix]
                side[f"mass_{matrix}"] = self[f"mass/{matrix}"] / self[matrix]
                side[f"best_{matrix}"], side[f"arg_{matrix}"] = best, arg
                side[f"right_{matrix}"] = self._are_positive(positives, arg)
        return side

    def _are_positive(self, positives: Positives, arg: Tensor) -> Tensor:
        at = torch.arange(len(arg), device=arg.device)
        return positives.are_positive(at, arg) if self._direction == ROW else positives.are_positive(arg, at)


def _walk(logits: Logits, inputs: Inputs, options: Options) -> tuple[Side, Side]:
    """Walk over the rectangle and return the statistics of its rows and of its columns."""
    positives, plan = Positives(inputs, logits.dtype), Plan.of(options, inputs.has_teacher, options.stats)
    shared = logits.shared_references()
    sides = _sums(logits, positives, plan, (shared, shared))
    if not all(side.exact for side in sides):
        sides = _sums(logits, positives, plan, _maxima(logits, positives, plan))
    return _statistics_of(sides, logits, positives, plan, options)


def _statistics_of(
    sides: list[Sums], logits: Logits, positives: Positives, plan: Plan, options: Options
) -> tuple[Side, Side]:
    """Return the statistics that the sums of the rows and of the columns make."""
    smoothed = options.contrastive and options.smoothing > 0
    totals = (logits.row_totals, logits.col_totals)
    rows, *cols = (
        side.statistics(positives, plan, total() if smoothed else None)
        for side, total in zip(sides, totals, strict=False)
    )
    return rows, cols[0] if cols else {}


def _sums(
    logits: Logits,
    positives: Positives,
    plan: Plan,
    references: tuple[References, References],
    tiles: Iterable[Tile] | None = None,
) -> list[Sums]:
    """Return the sums of one visit to every tile, of the rows and, if asked for, of the columns."""
    sides = [Sums(mine, positives, references[mine != ROW]) for mine in plan.directions]
    keep = ("t", "s") if plan.stats else ("t",)
    if tiles is None:
        tiles = (Tile(logits, positives, *at, *references, keep) for at in logits.tiles())
    for tile in tiles:
        for side in sides:
            side.visit(tile, plan, logits.has_margin)
        if logits.has_margin and tile.shared:
            for side in sides:
                side.visit_negatives(tile)
    for side in sides:
        side.close(logits.shift)
    return sides


def _maxima(logits: Logits, positives: Positives, plan: Plan) -> tuple[References, References]:
    """Return the exact maxima of the rows and columns of every matrix: references that no logits can defeat."""
    names = plan.matrices + ("z",) * logits.has_margin
    best = tuple(
        {
            name: torch.full_like(size, -math.inf)
            for name in names
            if direction in SOFTMAX_DIRECTIONS[name] and direction in plan.directions
        }
        for direction, size in enumerate(positives.counts)
    )
    for at_rows, at_cols in logits.tiles():
        tile = Tile(logits, positives, at_rows, at_cols, best[ROW], best[COL])
        for direction, maxima in enumerate(best):
            for name, values in maxima.items():
                mine = values[tile.at(direction)]
                torch.maximum(mine, tile.x(name).amax(direction), out=mine)
    return best[ROW], best[COL]
