"""The sigmoid form tile by tile in torch operations: one product for the terms, two more for the gradients.

The definition is ``contrastive_eager``. A tile yields its share of the terms and of the gradients and is
forgotten, so that memory is O((N + M)·D) plus a few tiles, and a backward pass needs nothing but the gradients.

What makes it fast: three products, positives as lists of positions unless a tile has many (a logit of −∞ takes
a pair out of the sums over negatives), and few passes over a tile that lies in the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._blocked_positives import Positives, TilePositives
from ._blocked_tile import Logits, add_product, inner_product
from .contrastive import TERMS, Biases, Inputs, Options
from .sigmoid import PairNeeds, Pairs

_CONTRASTIVE, _RELATIONAL = TERMS.index("contrastive"), TERMS.index("relational")


def walk(
    inputs: Inputs, biases: Biases, options: Options, needs: PairNeeds, upstream: Tensor | None = None
) -> Pairs:
    """Return the sums over pairs and the gradients of ``upstream · sums``, as ``needs`` asks for them."""
    pairs = _Walk(inputs, biases, options, needs, upstream)
    for at_rows in pairs.logits.row_blocks():
        pairs.visit(at_rows)
    return pairs.result()


class _Walk:
    """The walk over all tiles, and what it has added up."""

    # σ's gradient is Σ ds u·v, and δ more on the contrastive share of the negatives. The text's gradient before
    # its factor σ, times v, has the first; where no text's gradient is asked for, the image's times u has it.

    def __init__(
        self, inputs: Inputs, biases: Biases, options: Options, needs: PairNeeds, upstream: Tensor | None
    ) -> None:
        self.logits = logits = Logits(inputs, options, unit=1.0)
        self._inputs, self._biases, self._options, self._needs = inputs, biases, options, needs
        self._positives = Positives(inputs, logits.dtype, counted=False)
        self._upstream = None if upstream is None else upstream.to(logits.dtype)
        new_zeros = logits.scale.new_zeros
        u, v = logits.operands["u"], logits.operands["v"]
        need_rows = needs.image or (needs.logit_scale and not needs.text)
        self._d_image = new_zeros(u.shape) if need_rows else None  # both before their factor σ
        self._d_text = new_zeros(v.shape) if needs.text else None
        self._sums, self._d_scale, self._d_bias = (
            torch.zeros(shape, dtype=torch.float64, device=u.device) for shape in ((len(TERMS),), (), ())
        )
        self._room = u.new_empty(logits.tile_size) if needs.gradients and u.dtype != logits.dtype else None

    def visit(self, at_rows: slice) -> None:
        """Visit one row of tiles."""
        u = self.logits.operands["u"][at_rows]
        through = None if self._d_image is None else self._d_image[at_rows]
        for at_cols in self.logits.col_blocks():
            ds = self._tile(at_rows, at_cols)
            if ds is None:
                continue
            if self._needs.logit_bias:
                self._d_bias += ds.sum()
            if through is not None or self._d_text is not None:
                ds = self._as_operand(ds)
            if through is not None:
                add_product(through, ds, self.logits.operands["v"][at_cols].T)
            if self._d_text is not None:
                add_product(self._d_text[at_cols], ds.T, u.T)

    def _tile(self, at_rows: slice, at_cols: slice) -> Tensor | None:
        """Add a tile's share of the sums; return d/ds, if a gradient is asked for."""
        positives = self._positives.tile(at_rows, at_cols)
        s = self.logits.tile("s", at_rows, at_cols)
        divergence = None
        if self._options.relational and self._biases.teacher_logit_bias is not None:
            t = self.logits.tile("t", at_rows, at_cols).add_(self._biases.teacher_logit_bias)
            divergence = self._relational(s + self._biases.logit_bias, t)
        ds = self._contrastive(s, positives)
        if ds is None or divergence is None:
            return ds
        if self._upstream is None:
            return ds.add_(divergence)
        return ds.addcmul_(divergence, self._upstream[_RELATIONAL])

    def _contrastive(self, s: Tensor, positives: TilePositives | None) -> Tensor | None:
        """Add the contrastive share of a tile, whose logits are overwritten; return its part of d/ds."""
        bias, at = self._biases.logit_bias, None
        if positives:
            at = -(positives.take(s) + bias)
        x = s.add_(bias + self.logits.shift if self.logits.has_margin else bias)
        if positives:
            positives.put_(x, -torch.inf)
        if self._needs.sums:
            # log1p(eˣ) is exact in every dtype up to where x takes over.
            sums = F.softplus(x, threshold=_threshold(x)).sum()
            if positives and at is not None:
                sums += positives.sum(_softplus(at))
            self._sums[_CONTRASTIVE] += sums
        if not self._needs.gradients:
            return None
        ds = x.sigmoid_()
        if self._upstream is not None:
            ds *= self._upstream[_CONTRASTIVE]
        if self.logits.has_margin and self._needs.logit_scale:
            self._d_scale += self._options.margin * ds.sum()
        if positives and at is not None:
            at = at.sigmoid_() if self._upstream is None else at.sigmoid_() * self._upstream[_CONTRASTIVE]
            positives.put_(ds, -at)
        return ds

    def _relational(self, s: Tensor, t: Tensor) -> Tensor | None:
        """Add the relational share of a tile, whose logits are overwritten; return its d/ds without upstream."""
        p = t.sigmoid()
        if self._needs.sums:
            gap = _softplus(s).sub_(_softplus(t))
            self._sums[_RELATIONAL] += t.sub_(s).mul_(p).add_(gap).sum()
        return s.sigmoid_().sub_(p) if self._needs.gradients else None

    def _as_operand(self, ds: Tensor) -> Tensor:
        """Return a tile of gradients in the dtype of the products."""
        if self._room is None:
            return ds
        return self._room[: ds.numel()].view(ds.shape).copy_(ds)

    def result(self) -> Pairs:
        """Complete the gradients, after all rows were visited."""
        logits, needs = self.logits, self._needs
        if needs.logit_scale:
            x, other = (self._d_image, "u") if self._d_text is None else (self._d_text, "v")
            assert x is not None
            self._d_scale += inner_product(x, logits.operands[other])
        image, text = (
            x.mul_(logits.scale) if needed and x is not None else None
            for x, needed in ((self._d_image, needs.image), (self._d_text, needs.text))
        )
        return Pairs(
            self._sums.to(logits.dtype) if needs.sums else None,
            image,
            text,
            self._d_scale.to(logits.dtype) if needs.logit_scale else None,
            self._d_bias.to(logits.dtype) if needs.logit_bias else None,
        )


def _threshold(x: Tensor) -> float:
    """Return from where on log(1 + eˣ) equals x in the dtype of ``x``."""
    return 40.0 if x.dtype == torch.float64 else 20.0


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=_threshold(x))
