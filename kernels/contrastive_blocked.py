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
* positives are few, so they are lists of positions, not masks (with two large classes the definition is faster);
* base-2 exponentials, because torch's exp goes to MKL too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._blocked_gradients import GradientWalk, slopes
from ._blocked_tile import (
    COL,
    LN2,
    LOWEST,
    ROW,
    SOFTMAX_DIRECTIONS,
    Logits,
    Plan,
    Positives,
    References,
    Tile,
    TilePositives,
    target_weights,
)
from .contrastive import TERMS, Forward, Gradients, Inputs, Needs, Options, Saved, Statistics


def forward(inputs: Inputs, options: Options) -> Forward:
    """Return terms, statistics and diagnostics, in float64 for float64 features and else in float32."""
    logits = Logits(inputs, options)
    positives = Positives(inputs, logits)
    rows, cols = partial_statistics(logits, positives, Plan.of(options, inputs.has_teacher, options.stats))
    terms = _terms(rows, cols, logits, options)
    diagnostics = _diagnostics(rows, cols, positives, logits) if options.stats else logits.scale.new_empty(0)
    return Forward(terms, final_statistics(rows, "a"), final_statistics(cols, "b"), diagnostics)


def backward(grad_terms: Tensor, inputs: Inputs, saved: Saved, options: Options, needs: Needs) -> Gradients:
    """Return the gradients of ``grad_terms · terms``; ``saved`` are final statistics of whole rows and columns."""
    logits, plan = Logits(inputs, options), Plan.of(options, inputs.has_teacher, stats=False)
    rows, cols = slopes(grad_terms, saved, logits, options, plan)
    walk = GradientWalk(inputs, logits, rows, cols, options, plan, needs)
    for at_rows in logits.row_blocks():
        walk.visit(at_rows)
    return walk.gradients()


# ---------------------------------------------------------------------------------------------------
# Forward: sums of rows and columns.


class PartialStatistics:
    """Sums over every row (direction 1) or every column (direction 0) of a rectangle, filled tile by tile."""

    def __init__(self, direction: int, positives: Positives, others: int, references: References) -> None:
        self._direction = direction
        self.others = others  # summands
        self.positives = positives.counts[direction]
        self._references = references
        self._sums: dict[str, Tensor] = {}
        self._best: dict[str, tuple[Tensor, Tensor]] = {}
        self.lse: dict[str, Tensor] = {}
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
                self._scatter(f"positive/{name}", positives, tile.x_at_positives(name))
            e = tile.e(name, mine)
            if plan.stats and name in ("s", "t"):
                self._track_best(name, tile)
                self._reduce(f"first/{name}", tile, e * tile.x(name))
            if name != "s" or not (margin and tile.shared):
                self._reduce(name, tile, e)
            if name == "s" and margin and not tile.shared:
                self._reduce("z", tile, tile.e("z", mine))
            if positives and ((name == "s" and (margin or plan.stats)) or (name == "t" and plan.stats)):
                self._scatter(f"mass/{name}", positives, tile.at_positives(e))

    def visit_negatives(self, tile: Tile) -> None:
        """Add the negatives alone. Their exponentials are what is left of s afterwards."""
        e = tile.e("s", self._direction)
        if tile.positives:
            e.view(-1)[tile.positives.place] = 0.0
        self._reduce("negative", tile, e)

    def _reduce(self, name: str, tile: Tile, values: Tensor) -> None:
        self[name][tile.at(self._direction)] += values.sum(self._direction)

    def _scatter(self, name: str, positives: TilePositives, values: Tensor) -> None:
        self[name].index_add_(0, positives.along(self._direction), values)

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
            self.lse[name] = log + self._references[name]
        if "s" in self.lse:
            self.lse.setdefault("z", self.lse["s"])

    def kl(self, name: str) -> Tensor:
        """Return KL(softmax t ‖ softmax of ``name``) in bits."""
        return self[f"kl/{name}"] / self["t"] - self.lse["t"] + self.lse[name]

    def predictions(self, name: str) -> Tensor:
        """Return the index of the largest logit."""
        return self._best[name][1]

    def diagnostics(self, name: str, positives: Positives) -> list[Tensor]:
        """Return the means of the diagnostics of one model, in the order of ``contrastive.MODEL_DIAGNOSTICS``."""
        best, place = self._best[name]
        entropy = LN2 * (self.lse[name] - self[f"first/{name}"] / self[name])
        confidence = (best - self.lse[name]).exp2()
        probability = self[f"mass/{name}"] / self[name]
        at = torch.arange(len(place), device=place.device)
        right = (
            positives.are_positive(at, place) if self._direction == ROW else positives.are_positive(place, at)
        )
        return [x.mean() for x in (entropy, confidence, probability, right.to(probability.dtype))]


def partial_statistics(
    logits: Logits, positives: Positives, plan: Plan
) -> tuple[PartialStatistics, PartialStatistics]:
    """Walk over the rectangle and return the statistics of its rows and of its columns."""
    shared = logits.shared_references()
    rows, cols = _sums(logits, positives, plan, shared, shared)
    if not (rows.exact and cols.exact):
        rows, cols = _sums(logits, positives, plan, *_maxima(logits, positives, plan))
    return rows, cols


def _sums(
    logits: Logits, positives: Positives, plan: Plan, row_references: References, col_references: References
) -> tuple[PartialStatistics, PartialStatistics]:
    """Return the sums of one visit to every tile."""
    rows = PartialStatistics(ROW, positives, logits.m, row_references)
    cols = PartialStatistics(COL, positives, logits.n, col_references)
    keep = ("t", "s") if plan.stats else ("t",)
    for at_rows, at_cols in logits.tiles():
        tile = Tile(logits, positives, at_rows, at_cols, row_references, col_references, keep)
        for side in (rows, cols):
            side.visit(tile, plan, logits.has_margin)
        if logits.has_margin and tile.shared:
            for side in (rows, cols):
                side.visit_negatives(tile)
    for side in (rows, cols):
        side.close(logits.shift)
    return rows, cols


def _maxima(logits: Logits, positives: Positives, plan: Plan) -> tuple[References, References]:
    """Return the exact maxima of the rows and columns of every matrix: references that no logits can defeat."""
    names = plan.matrices + ("z",) * logits.has_margin
    best = tuple(
        {name: torch.full_like(size, -math.inf) for name in names if direction in SOFTMAX_DIRECTIONS[name]}
        for direction, size in enumerate(positives.counts)
    )
    for at_rows, at_cols in logits.tiles():
        tile = Tile(logits, positives, at_rows, at_cols, best[ROW], best[COL])
        for direction, maxima in enumerate(best):
            for name, values in maxima.items():
                mine = values[tile.at(direction)]
                torch.maximum(mine, tile.x(name).amax(direction), out=mine)
    return best[ROW], best[COL]


# ---------------------------------------------------------------------------------------------------
# Forward: from the statistics of whole rows and columns to the result.


def _terms(rows: PartialStatistics, cols: PartialStatistics, logits: Logits, options: Options) -> Tensor:
    """Return the vector of terms from the statistics of whole rows and whole columns."""
    terms = dict.fromkeys(TERMS, logits.scale.new_zeros(()))
    for side, x, totals in ((rows, "a", logits.row_totals), (cols, "b", logits.col_totals)):
        count, others = side.positives, side.others
        if options.contrastive:
            q_positive, q_negative = target_weights(count, others, options.smoothing)
            expected = (q_positive - q_negative) * side["positive/s"]
            if options.smoothing:
                expected += q_negative * (totals() + (others - count) * logits.shift)
            terms["contrastive"] = terms["contrastive"] + (side.lse["z"] - expected).mean()
        if options.relational:
            terms["relational"] = terms["relational"] + side.kl("s").mean()
        if options.interactive:
            terms["interactive"] = terms["interactive"] + (side.lse[x] - side[f"positive/{x}"] / count).mean()
        if options.cross:
            terms["cross"] = terms["cross"] + side.kl(x).mean()
    return 0.5 * LN2 * torch.stack(list(terms.values()))


def final_statistics(side: PartialStatistics, x: str) -> Tensor:
    """Return what the backward pass takes of whole rows (``x`` "a") or columns ("b").

    A row without a positive has no target: NaN takes the place of the log-sum-exps that a target belongs to, and
    with them of the row's gradient. This is the only place that writes it.
    """
    missing = torch.zeros_like(side.positives)
    z, s, t, cross = (side.lse.get(name, missing) for name in ("z", "s", "t", x))
    stats = torch.stack(Statistics(z, s, t, cross, side.positives))
    for name in ("lse_z", "lse_x"):
        stats[Statistics._fields.index(name)].masked_fill_(side.positives == 0, math.nan)
    return stats


def _diagnostics(
    rows: PartialStatistics, cols: PartialStatistics, positives: Positives, logits: Logits
) -> Tensor:
    """Return the diagnostics in the order of ``contrastive.diagnostic_names``."""
    values = []
    for name in ("s", "t") if logits.has_teacher else ("s",):
        values += rows.diagnostics(name, positives) + cols.diagnostics(name, positives)
    if logits.has_teacher:
        for side in (rows, cols):
            agree = side.predictions("s") == side.predictions("t")
            values += [agree.to(logits.dtype).mean(), LN2 * side.kl("s").mean()]
    return torch.stack(values)
