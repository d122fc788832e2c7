"""Backward half of the blocked implementation: gradients of tiles, and the walk that adds them up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._blocked_positives import COL, ROW, Positives, TilePositives
from ._blocked_tile import (
    HIGHEST,
    LOWEST,
    SOFTMAX_DIRECTIONS,
    SUMMANDS,
    Logits,
    Plan,
    References,
    Tile,
    add_product,
    inner_product,
)
from ._statistics import Whole, target_weights
from .contrastive import Gradients, Inputs, Needs, Options, Saved, Statistics


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
        others: int,
    ) -> None:
        final = Statistics(*stats.unbind())
        x = "a" if direction == ROW else "b"
        lse = {"z": final.lse_z, "s": final.lse_s, "t": final.lse_t, x: final.lse_x}
        left_out = final.positives < 0
        enabled = ("s" in plan.targets, "s" in plan.kl, x in plan.targets, x in plan.kl)
        contrastive, relational, interactive, cross = (
            grad if on else torch.zeros_like(grad) for grad, on in zip(grads.unbind(), enabled, strict=True)
        )
        q_positive, q_negative = target_weights(final.positives, others, smoothing)
        self.direction, self.smoothed = direction, smoothing > 0
        self.target, self.q_negative = contrastive * q_positive, contrastive * q_negative
        self.cross_target = interactive / final.positives
        self.exact = True
        self.references: References = lse if references is None else references
        step = {
            name: (self.references[name] - lse[name]).masked_fill(left_out, -torch.inf)
            for name in lse
            if name in self.references
        }
        if references is not None:
            used = [name for name in plan.matrices if direction in SOFTMAX_DIRECTIONS[name]]
            checked = [step[name] for name in used] + [step["z"] + logits.shift] * ("s" in used)
            low, high = torch.cat(checked).masked_fill(left_out.repeat(len(checked)), 0.0).aminmax()
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


def slopes(
    grad_terms: Tensor,
    saved: Saved,
    logits: Logits,
    options: Options,
    plan: Plan,
    whole: Whole,
    weights: Tensor | None,
) -> list[Slopes]:
    """Return the slopes along rows and, if asked for, along columns, with shared references where they serve."""
    grads = grad_terms.to(logits.dtype)
    row_grads, col_grads = (
        (0.5 * grads / whole.rows, 0.5 * grads / whole.cols)
        if weights is None
        else (weights.to(logits.dtype)[:, None] * grads).unbind()
    )
    sides = ((ROW, saved.row_stats, row_grads, whole.cols), (COL, saved.col_stats, col_grads, whole.rows))

    def along(references: References | None) -> list[Slopes]:
        return [
            Slopes(mine, stats, grad, logits, options.smoothing, plan, references, others)
            for mine, stats, grad, others in sides
            if mine in plan.directions
        ]

    shared = along(logits.shared_references())
    return shared if all(side.exact for side in shared) else along(None)


class GradientWalk:
    """The walk of the backward pass, from the gradients of the logits to those of the inputs.

    ``kept`` are tiles of the forward pass by their first row and column, ``dtype`` that of the features'
    gradients, by default the features' own.
    """

    # σ's gradient is Σ ds u·v + Σ da u·v' + Σ db u'·v. The text's gradient before its factor σ, times v, has the
    # first and the last; the part of the image's that comes through a, times u, has the other. Where no term takes
    # a softmax of s, as beside a sigmoid, nothing comes through s.

    def __init__(
        self,
        inputs: Inputs,
        logits: Logits,
        sides: list[Slopes],
        options: Options,
        plan: Plan,
        needs: Needs,
        kept: Mapping[tuple[int, int], Tile] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._logits, self._kept = logits, kept
        self._dtype = inputs.image.dtype if dtype is None else dtype
        self._positives = Positives(inputs, logits.dtype, counted=False)
        self._sides, self._options, self._plan, self._needs = sides, options, plan, needs
        rows, *cols = sides
        self._rows, self._cols = rows, cols[0] if cols else None
        shared = rows.references if isinstance(rows.references["s"], float) else {}
        self._references = rows.references, self._cols.references if self._cols else shared
        self._has_s, self._has_b = "s" in plan.matrices, "b" in plan.matrices
        need_cols = needs.text or (needs.logit_scale and self._has_b)
        self._need_rows = self._has_s and (needs.image or (needs.logit_scale and not need_cols))
        self._need_a = "a" in plan.matrices and (needs.image or needs.logit_scale)

        image, u, v = inputs.image, logits.operands["u"], logits.operands["v"]
        self._d_image = (
            torch.empty(image.shape, dtype=self._dtype, device=image.device) if needs.image else None
        )
        self._d_text = logits.scale.new_zeros(v.shape) if need_cols else None  # before its factor σ
        self._d_scale = torch.zeros((), dtype=torch.float64, device=image.device)
        if options.smoothing:  # what every image gets from the constants per column, and per unit of its own
            from_cols = self._cols.q_negative @ v.to(logits.dtype) if self._cols else v.new_zeros(v.shape[1])
            self._to_all = from_cols.to(logits.dtype)[None]
            self._text_total = v.sum(0, dtype=logits.dtype)[None]
        self._room = u.new_empty((self._has_s + self._has_b) * logits.tile_size)

    def visit(self, at_rows: slice) -> None:
        """Visit one row of tiles and complete the gradients of its images."""
        plan, operands = self._plan, self._logits.operands
        u, height = operands["u"][at_rows], at_rows.stop - at_rows.start
        new_zeros = self._logits.scale.new_zeros
        through_s = new_zeros(height, u.shape[1]) if self._need_rows else None
        through_a = new_zeros(height, u.shape[1]) if self._need_a else None
        left = operands["tu"][at_rows] if self._has_b else u
        if self._has_s and self._has_b:
            left = torch.cat([u, left])
        for at_cols in self._logits.col_blocks():
            tile = self._tile(at_rows, at_cols)
            # ds above db, so that one product takes both to the text's gradient.
            stack = self._room[: len(left) * (at_cols.stop - at_cols.start)].view(len(left), -1)
            if self._has_s:
                ds = stack[:height]
                at_positives = _student_gradient(tile, self._sides, plan, ds, self._logits.has_margin)
                if at_positives is not None:
                    self._d_scale -= self._options.margin * at_positives
                if through_s is not None:
                    add_product(through_s, ds, operands["v"][at_cols].T)
            if through_a is not None:
                da = u.new_empty(height, at_cols.stop - at_cols.start)
                _cross_gradient("a", tile, self._rows, plan, da)
                add_product(through_a, da, operands["tv"][at_cols].T)
            if self._d_text is not None:
                if self._has_b and self._cols:
                    _cross_gradient("b", tile, self._cols, plan, stack[-height:])
                add_product(self._d_text[at_cols], stack.T, left.T)
        self._complete_images(at_rows, through_s, through_a)

    def _tile(self, at_rows: slice, at_cols: slice) -> Tile:
        if self._kept is not None:
            return self._kept[at_rows.start, at_cols.start]
        return Tile(self._logits, self._positives, at_rows, at_cols, *self._references)

    def _complete_images(self, at_rows: slice, through_s: Tensor | None, through_a: Tensor | None) -> None:
        """Take what reaches these images through s and through a to their gradient and to σ's."""
        u = self._logits.operands["u"][at_rows]
        if through_s is not None and self._options.smoothing:
            through_s -= torch.addmm(self._to_all, self._rows.q_negative[at_rows, None], self._text_total)
        if self._needs.logit_scale and through_a is not None:
            self._d_scale += inner_product(through_a, u)
        if self._needs.logit_scale and self._d_text is None and through_s is not None:
            self._d_scale += inner_product(through_s, u)
        if self._d_image is not None:
            total = through_a if through_s is None else through_s
            if through_s is not None and through_a is not None:
                total = through_s.add_(through_a)
            assert total is not None  # a term is on
            self._d_image[at_rows] = self._logits.scale * total

    def gradients(self) -> Gradients:
        """Complete the texts' gradient and σ's, after all rows were visited."""
        d_text, logits = self._d_text, self._logits
        if d_text is not None:
            u, v = logits.operands["u"], logits.operands["v"]
            if self._options.smoothing:
                from_rows = self._rows.q_negative @ u.to(logits.dtype)
                if self._cols:
                    from_rows = self._cols.q_negative[:, None] * u.sum(0, dtype=logits.dtype) + from_rows
                d_text -= from_rows
            if self._needs.logit_scale:
                self._d_scale += inner_product(d_text, v)
            d_text = d_text.mul_(logits.scale).to(self._dtype)
        return Gradients(
            self._d_image,
            d_text if self._needs.text else None,
            self._d_scale.to(logits.dtype) if self._needs.logit_scale else None,
        )


def _student_gradient(
    tile: Tile, sides: list[Slopes], plan: Plan, out: Tensor, has_margin: bool
) -> Tensor | None:
    """Write d/ds, without the constants of the smoothing, to ``out``.

    Returns the sum of d/dz over the positives of the tile, None if there are none or no margin that needs it.
    """
    positives, at_positives = tile.positives, None
    if tile.shared:
        e = tile.e("s", ROW)
        apart = has_margin and positives  # without a margin positives and negatives have one factor
        before = tile.e_at_positives("s", ROW) if apart else None
        ds = _times_sum(e, [tile.spread(side.negative, side.direction) for side in sides], _if_same(out, e))
        if positives and before is not None:
            at_positives = before * _at(sides, "z", positives)
            positives.put_(ds, before * _at(sides, "positive", positives))
    else:
        ds = tile.e("z", ROW) * tile.spread(sides[0].z, ROW)
        for side in sides[1:]:
            ds.addcmul_(tile.e("z", side.direction), tile.spread(side.z, side.direction))
        at_positives = tile.at_positives(ds) if positives and has_margin else None
        if "s" in plan.kl:
            for side in sides:
                ds.addcmul_(tile.e("s", side.direction), tile.spread(side.s, side.direction))
    if positives and "s" in plan.targets:
        target = _at(sides, "target", positives)
        correction = target - _at(sides, "q_negative", positives) if sides[0].smoothed else target
        positives.subtract_(ds, correction)
        if at_positives is not None:
            at_positives = at_positives - target
    if positives and at_positives is not None:
        at_positives = positives.sum(at_positives, torch.float64)
    if "s" in plan.kl:
        if tile.shared:
            both = _sum([tile.spread(side.t, side.direction) for side in sides])
            ds.addcmul_(tile.e("t", ROW), both, value=-1)
        else:
            for side in sides:
                ds.addcmul_(tile.e("t", side.direction), tile.spread(side.t, side.direction), value=-1)
    if ds.data_ptr() != out.data_ptr():
        out.copy_(ds)
    return at_positives


def _at(sides: list[Slopes], name: str, positives: TilePositives) -> Tensor:
    """Return the sum of a vector over the rows and of one over the columns at the positives."""
    return _sum([positives.spread(getattr(side, name), side.direction) for side in sides])


def _sum(parts: list[Tensor]) -> Tensor:
    """Return the sum of one or two tensors."""
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _times_sum(e: Tensor, parts: list[Tensor], out: Tensor) -> Tensor:
    """Return ``e`` times the sum of one or two vectors, in ``out``, which may be ``e``."""
    if len(parts) == 1:
        return torch.mul(e, parts[0], out=out)
    return torch.add(*parts, out=out).mul_(e)


def _cross_gradient(name: str, tile: Tile, side: Slopes, plan: Plan, out: Tensor) -> None:
    """Write d/da, over rows, or d/db, over columns, to ``out``."""
    mine = side.direction
    e = tile.e(name, mine)
    d = torch.mul(e, tile.spread(side.cross, mine), out=_if_same(out, e))
    if name in plan.kl:
        d.addcmul_(tile.e("t", mine), tile.spread(side.t_cross, mine), value=-1)
    if name in plan.targets and tile.positives:
        tile.positives.subtract_(d, tile.positives.spread(side.cross_target, mine))
    if d.data_ptr() != out.data_ptr():
        out.copy_(d)


def _if_same(out: Tensor, e: Tensor) -> Tensor:
    """Return ``out`` if it has the dtype of the tile's arithmetic, else room for it."""
    return out if out.dtype == e.dtype else torch.empty_like(e)
