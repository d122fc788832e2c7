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

from ._blocked_tile import (
    COL,
    DIRECTIONS,
    HIGHEST,
    LN2,
    LOWEST,
    ROW,
    SUMMANDS,
    Logits,
    Plan,
    Positives,
    References,
    Tile,
    TilePositives,
    add_product,
    inner_product,
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
    rows, cols = _slopes(grad_terms, saved, logits, options, plan)
    walk = _GradientWalk(inputs, logits, rows, cols, options, plan, needs)
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
            if mine not in DIRECTIONS[name]:
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
            self._best[name] = (
                torch.full_like(self.positives, -math.inf),
                torch.zeros_like(self.positives).long(),
            )
        value, place = self._best[name]
        at, offset = tile.at(self._direction), tile.at(1 - self._direction).start
        new, where = tile.x(name).max(self._direction)
        place[at] = torch.where(new > value[at], where + offset, place[at])
        value[at] = torch.maximum(new, value[at])

    def close(self, shift: Tensor) -> None:
        """Turn the sums into log-sum-exps and judge whether the references served."""
        if "negative" in self._sums:
            self._sums["s"] = self["negative"] + self["mass/s"]
        logs = {name: self._sums[name].log2() for name in DIRECTIONS if name in self._sums}
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
        {name: torch.full_like(size, -math.inf) for name in names if direction in DIRECTIONS[name]}
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


def _target_weights(count: Tensor, others: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the target q of a positive and of a negative, for ``count`` positives among ``others``."""
    if smoothing == 0.0:
        return 1 / count, torch.zeros_like(count)
    q_negative = torch.where(count < others, smoothing / (others - count), 0.0)
    return (1 - q_negative * (others - count)) / count, q_negative


def _terms(rows: PartialStatistics, cols: PartialStatistics, logits: Logits, options: Options) -> Tensor:
    """Return the vector of terms from the statistics of whole rows and whole columns."""
    terms = dict.fromkeys(TERMS, logits.scale.new_zeros(()))
    for side, x, totals in ((rows, "a", logits.row_totals), (cols, "b", logits.col_totals)):
        count, others = side.positives, side.others
        if options.contrastive:
            q_positive, q_negative = _target_weights(count, others, options.smoothing)
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


# ---------------------------------------------------------------------------------------------------
# Backward: gradients of tiles.


class Slopes:
    """One direction's share of the gradients with respect to the logits.

    A gradient is a sum of the tile's exponentials, each times a vector over the rows (columns), minus
    targets. The vectors hold the upstream gradient, ½/N (½/M) and exp2(reference − log-sum-exp).
    Without ``references`` the log-sum-exps themselves are the references, so that nothing can overflow.
    """

    def __init__(
        self,
        direction: int,
        stats: Tensor,
        grads: Tensor,
        logits: Logits,
        smoothing: float,
        plan: Plan,
        references: References | None,
    ) -> None:
        final = Statistics(*stats.unbind())
        x, others = ("a", logits.m) if direction == ROW else ("b", logits.n)
        lse = {"z": final.lse_z, "s": final.lse_s, "t": final.lse_t, x: final.lse_x}
        enabled = ("s" in plan.targets, "s" in plan.kl, x in plan.targets, x in plan.kl)
        contrastive, relational, interactive, cross = (
            grad if on else torch.zeros_like(grad) for grad, on in zip(grads.unbind(), enabled, strict=True)
        )
        q_positive, q_negative = _target_weights(final.positives, others, smoothing)
        self.direction, self.smoothed = direction, smoothing > 0
        self.target, self.q_negative = contrastive * q_positive, contrastive * q_negative
        self.cross_target = interactive / final.positives
        self.exact = True
        self.references: References = lse if references is None else references
        step = {name: self.references[name] - lse[name] for name in lse if name in self.references}
        if references is not None:
            used = [name for name in plan.matrices if direction in DIRECTIONS[name]]
            checked = [step[name] for name in used] + [step["z"] + logits.shift]
            low, high = torch.cat(checked).aminmax()
            # Far below, a slope, which has 1/N as another factor, would be a subnormal number.
            self.exact = bool(low >= -HIGHEST - SUMMANDS) and bool(high <= -LOWEST)
        self.z = contrastive * step["z"].exp2()
        self.s = relational * step["s"].exp2()
        self.negative = self.s + contrastive * (step["z"] + logits.shift).exp2()
        self.positive = self.s + self.z
        if "t" in step:
            self.t, self.t_cross = relational * step["t"].exp2(), cross * step["t"].exp2()
        if x in step:
            self.cross = (interactive + cross) * step[x].exp2()


def _slopes(
    grad_terms: Tensor, saved: Saved, logits: Logits, options: Options, plan: Plan
) -> tuple[Slopes, Slopes]:
    """Return the slopes along rows and along columns, with shared references where they serve."""
    half = 0.5 * grad_terms.to(logits.dtype)

    def along_both(references: References | None) -> tuple[Slopes, Slopes]:
        return (
            Slopes(ROW, saved.row_stats, half / logits.n, logits, options.smoothing, plan, references),
            Slopes(COL, saved.col_stats, half / logits.m, logits, options.smoothing, plan, references),
        )

    rows, cols = along_both(logits.shared_references())
    return (rows, cols) if rows.exact and cols.exact else along_both(None)


class _GradientWalk:
    """The walk of the backward pass, from the gradients of the logits to those of the inputs."""

    # σ's gradient is Σ ds u·v + Σ da u·v' + Σ db u'·v. The text's gradient before its factor σ, times v, has the
    # first and the last; the part of the image's that comes through a, times u, has the other.

    def __init__(
        self,
        inputs: Inputs,
        logits: Logits,
        rows: Slopes,
        cols: Slopes,
        options: Options,
        plan: Plan,
        needs: Needs,
    ) -> None:
        self._inputs, self._logits, self._positives = inputs, logits, Positives(inputs, logits)
        self._rows, self._cols, self._options, self._plan, self._needs = rows, cols, options, plan, needs
        self._has_cross = "b" in plan.matrices
        need_cols = needs.text or (needs.logit_scale and self._has_cross)
        self._need_rows = needs.image or (needs.logit_scale and not need_cols)
        self._need_a = self._has_cross and (needs.image or needs.logit_scale)

        image, u, v = inputs.image, logits.operands["u"], logits.operands["v"]
        self._d_image = (
            torch.empty(image.shape, dtype=image.dtype, device=image.device) if needs.image else None
        )
        self._d_text = logits.scale.new_zeros(v.shape) if need_cols else None  # before its factor σ
        self._d_scale = torch.zeros((), dtype=torch.float64, device=image.device)
        if options.smoothing:  # what every image gets from the constants per column, and per unit of its own
            self._to_all = (cols.q_negative @ v.to(logits.dtype))[None]
            self._text_total = v.sum(0, dtype=logits.dtype)[None]
        self._room = u.new_empty((2 if self._has_cross else 1) * logits.tile_size)

    def visit(self, at_rows: slice) -> None:
        """Visit one row of tiles and complete the gradients of its images."""
        rows, cols, plan, operands = self._rows, self._cols, self._plan, self._logits.operands
        u, height = operands["u"][at_rows], at_rows.stop - at_rows.start
        new_zeros = self._logits.scale.new_zeros
        through_s = new_zeros(height, u.shape[1]) if self._need_rows else None
        through_a = new_zeros(height, u.shape[1]) if self._need_a else None
        left = torch.cat([u, operands["tu"][at_rows]]) if self._has_cross else u
        for at_cols in self._logits.col_blocks():
            tile = Tile(self._logits, self._positives, at_rows, at_cols, rows.references, cols.references)
            # ds above db, so that one product takes both to the text's gradient.
            stack = self._room[: len(left) * (at_cols.stop - at_cols.start)].view(len(left), -1)
            ds, db = stack[:height], stack[height:]
            at_positives = _student_gradient(tile, rows, cols, plan, ds)
            if self._logits.has_margin and at_positives is not None:
                self._d_scale -= self._options.margin * at_positives
            if through_s is not None:
                add_product(through_s, ds, operands["v"][at_cols].T)
            if through_a is not None:
                da = torch.empty_like(ds)
                _cross_gradient("a", tile, rows, plan, da)
                add_product(through_a, da, operands["tv"][at_cols].T)
            if self._d_text is not None:
                if self._has_cross:
                    _cross_gradient("b", tile, cols, plan, db)
                add_product(self._d_text[at_cols], stack.T, left.T)
        self._complete_images(at_rows, through_s, through_a)

    def _complete_images(self, at_rows: slice, through_s: Tensor | None, through_a: Tensor | None) -> None:
        """Take what reaches these images through s and through a to their gradient and to σ's."""
        u = self._logits.operands["u"][at_rows]
        if through_s is not None and self._options.smoothing:
            through_s -= torch.addmm(self._to_all, self._rows.q_negative[at_rows, None], self._text_total)
        if self._needs.logit_scale and through_a is not None:
            self._d_scale += inner_product(through_a, u)
        if self._needs.logit_scale and self._d_text is None and through_s is not None:
            self._d_scale += inner_product(through_s, u)
        if self._d_image is not None and through_s is not None:
            total = through_s if through_a is None else through_s.add_(through_a)
            self._d_image[at_rows] = self._logits.scale * total

    def gradients(self) -> Gradients:
        """Complete the texts' gradient and σ's, after all rows were visited."""
        d_text, logits = self._d_text, self._logits
        if d_text is not None:
            u, v = logits.operands["u"], logits.operands["v"]
            if self._options.smoothing:
                from_cols = self._cols.q_negative[:, None] * u.sum(0, dtype=logits.dtype)
                d_text -= from_cols + self._rows.q_negative @ u.to(logits.dtype)
            if self._needs.logit_scale:
                self._d_scale += inner_product(d_text, v)
            d_text = d_text.mul_(logits.scale).to(self._inputs.text.dtype)
        return Gradients(
            self._d_image,
            d_text if self._needs.text else None,
            self._d_scale.to(logits.dtype) if self._needs.logit_scale else None,
        )


def _student_gradient(tile: Tile, rows: Slopes, cols: Slopes, plan: Plan, out: Tensor) -> Tensor | None:
    """Write d/ds, without the constants of the smoothing, to ``out``.

    Returns the sum of d/dz over the positives of the tile, None if there are none.
    """
    positives, at_positives = tile.positives, None
    if tile.shared:
        e = tile.e("s", ROW)
        before = tile.at_positives(e) if positives else None
        ds = torch.add(
            tile.spread(rows.negative, ROW), tile.spread(cols.negative, COL), out=_if_same(out, e)
        ).mul_(e)
        if positives and before is not None:
            _, row, col = positives
            at_positives = before * (rows.z[row] + cols.z[col])
            ds.view(-1)[positives.place] = before * (rows.positive[row] + cols.positive[col])
    else:
        ds = tile.e("z", ROW) * tile.spread(rows.z, ROW)
        ds.addcmul_(tile.e("z", COL), tile.spread(cols.z, COL))
        at_positives = tile.at_positives(ds) if positives else None
        if "s" in plan.kl:
            for side in (rows, cols):
                ds.addcmul_(tile.e("s", side.direction), tile.spread(side.s, side.direction))
    if positives and at_positives is not None:
        place, row, col = positives
        target = rows.target[row] + cols.target[col]
        correction = target - rows.q_negative[row] - cols.q_negative[col] if rows.smoothed else target
        ds.view(-1).index_add_(0, place, correction, alpha=-1)
        at_positives = (at_positives - target).sum(dtype=torch.float64)
    if "s" in plan.kl:
        if tile.shared:
            both = tile.spread(rows.t, ROW) + tile.spread(cols.t, COL)
            ds.addcmul_(tile.e("t", ROW), both, value=-1)
        else:
            for side in (rows, cols):
                ds.addcmul_(tile.e("t", side.direction), tile.spread(side.t, side.direction), value=-1)
    if ds.data_ptr() != out.data_ptr():
        out.copy_(ds)
    return at_positives


def _cross_gradient(name: str, tile: Tile, side: Slopes, plan: Plan, out: Tensor) -> None:
    """Write d/da, over rows, or d/db, over columns, to ``out``."""
    mine = side.direction
    e = tile.e(name, mine)
    d = torch.mul(e, tile.spread(side.cross, mine), out=_if_same(out, e))
    if name in plan.kl:
        d.addcmul_(tile.e("t", mine), tile.spread(side.t_cross, mine), value=-1)
    if name in plan.targets and tile.positives:
        target = side.cross_target[tile.positives.along(mine)]
        d.view(-1).index_add_(0, tile.positives.place, target, alpha=-1)
    if d.data_ptr() != out.data_ptr():
        out.copy_(d)


def _if_same(out: Tensor, e: Tensor) -> Tensor:
    """Return ``out`` if it has the dtype of the tile's arithmetic, else room for it."""
    return out if out.dtype == e.dtype else torch.empty_like(e)
