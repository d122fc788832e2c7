"""The contrastive objective tile by tile in torch operations: bounded memory, made for CPUs.

The same walk as the GPU kernels (``contrastive.py``); the definition is ``eager.py``. The N×M logit
matrices are visited in tiles; a tile yields everything that any term needs from it and is forgotten.
Backward computes the tiles once more from the saved log-sum-exps. Nothing quadratic is ever stored:
memory is O((N + M)·D) plus a few tiles.

What makes it fast, in order of weight:

* work: 4 products forward and 8 backward for the whole objective, 1 and 3 for the CLIP loss;
* the products of float32 features go to oneDNN, where torch would ask MKL: 2.4 times as fast on
  AVX-512 processors that are not Intel's; on Intel's MKL is the faster one, by 12 % of the whole loss;
* one exponential per logit matrix. exp(x − c) with one constant c serves the row *and* the column
  softmax as long as no log-sum-exp lies too far below c. That is checked on the sums; where it fails
  (wild logits) a second walk takes the exact maxima of rows and columns as references instead;
* the margin needs no exponential of its own: it multiplies the negatives by exp(σδ);
* label smoothing is a constant per row plus one per column, so its part of loss and gradients has
  rank one and never touches a tile;
* positives are few, so they are lists of positions, not masks;
* base-2 exponentials (torch's exp goes to MKL: 4 times as slow on the same processors).

The lists of positives fall short where classes are few and large: of the definition's speed (``eager.py``)
the MPM-NCE loss has 3.9 times with 100 classes, 1.38 times with 5 and 0.69 times, so less, with 2.

A product of bfloat16 features comes out of a CPU's matmul rounded to bfloat16, so logits carry 8 bits
there, as they do in torch's own operations under autocast; everything after the product is float32.

Layout of the statistics, base-2 logarithms, float32 (float64 for float64 features)::

    row_stats [5, N]: log-sum-exp of z, s, t, a over the columns, number of positives
    col_stats [5, M]: log-sum-exp of z, s, t, b over the rows,    number of positives
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import eager
from ._processor import bfloat16_unit

# Largest tile. Small enough that the tiles of the four logit matrices stay in the last-level cache,
# large enough that products and per-operation costs are efficient (see benchmarks/losses.py).
ROWS, COLS = 512, 1024

# Base-2 bounds around the shared reference c. x − c <= _HIGHEST leaves room in float32 for 2**26 summands
# and their product with a logit. A sum of 2**(x − c) is exact while it is at least 2**_LOWEST: whatever
# underflows (below 2**-126) is then less than 2**-40 of it, for any number of columns up to 2**26.
_HIGHEST, _LOWEST, _SUMMANDS = 88.0, -60.0, 26.0

_LOG2E, _LN2 = math.log2(math.e), math.log(2.0)

# The logit matrices and the directions in which their softmax is taken: 1 over a row, 0 over a column.
_ROW, _COL = 1, 0
_DIRECTIONS = {"z": (_ROW, _COL), "s": (_ROW, _COL), "t": (_ROW, _COL), "a": (_ROW,), "b": (_COL,)}

References = Mapping[str, "Tensor | float"]


def forward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None,
    text_labels: Tensor | None,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_scale: Tensor | None,
    margin: float,
    smoothing: float,
    enabled: Sequence[bool],
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(terms [4], row_stats [5, N], col_stats [5, M], diagnostics); see ``eager.contrastive_terms``."""
    logits = _Logits(image, text, logit_scale, teacher_image, teacher_text, teacher_scale, margin)
    positives = _Positives(labels, text_labels, logits)
    options = _Options.of(enabled, stats, logits)

    shared = logits.shared_references()
    rows, cols = _sums(logits, positives, options, shared, shared)
    if not (rows.exact and cols.exact):
        rows, cols = _sums(logits, positives, options, *_maxima(logits, positives, options))

    terms = [logits.scale.new_zeros(())] * len(eager.TERMS)
    for side, x, totals in ((rows, "a", logits.row_totals), (cols, "b", logits.col_totals)):
        count, others = side.positives, side.others
        if enabled[0]:
            hit, miss = _target_weights(count, others, smoothing)
            expected = (hit - miss) * side["positive/s"]
            if smoothing:
                expected += miss * (totals() + (others - count) * logits.shift)
            terms[0] = terms[0] + (side.lse["z"] - expected).mean()
        if enabled[1]:
            terms[1] = terms[1] + side.kl("s").mean()
        if enabled[2]:
            terms[2] = terms[2] + (side.lse[x] - side[f"positive/{x}"] / count).mean()
        if enabled[3]:
            terms[3] = terms[3] + side.kl(x).mean()
    measured = _diagnostics(rows, cols, positives, logits) if stats else logits.scale.new_empty(0)
    return 0.5 * _LN2 * torch.stack(terms), rows.saved("a"), cols.saved("b"), measured


def backward(
    grad_terms: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None,
    text_labels: Tensor | None,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_scale: Tensor | None,
    row_stats: Tensor,
    col_stats: Tensor,
    margin: float,
    smoothing: float,
    enabled: Sequence[bool],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``grad_terms · terms`` with respect to image, text and logit_scale, where needed."""
    logits = _Logits(image, text, logit_scale, teacher_image, teacher_text, teacher_scale, margin)
    positives = _Positives(labels, text_labels, logits)
    options = _Options.of(enabled, False, logits)
    half = 0.5 * grad_terms.to(logits.dtype)
    shared = logits.shared_references()
    rows = _Slopes(_ROW, row_stats, half / logits.n, logits, smoothing, options, shared)
    cols = _Slopes(_COL, col_stats, half / logits.m, logits, smoothing, options, shared)
    if not (rows.exact and cols.exact):
        rows = _Slopes(_ROW, row_stats, half / logits.n, logits, smoothing, options, None)
        cols = _Slopes(_COL, col_stats, half / logits.m, logits, smoothing, options, None)

    # σ's gradient is Σ ds u·v + Σ da u·v' + Σ db u'·v. The text's gradient before its factor σ, times v,
    # has the first and the last; the part of the image's that comes through a, times u, has the other.
    need_image, need_text, need_scale = needs
    has_cross = "b" in options.matrices
    need_cols = need_text or (need_scale and has_cross)
    need_rows = need_image or (need_scale and not need_cols)
    operands, accumulator = logits.operands, logits.scale.new_zeros
    u, v = operands["u"], operands["v"]
    d_image = torch.empty(image.shape, dtype=image.dtype, device=image.device) if need_image else None
    d_text = accumulator(v.shape) if need_cols else None
    d_scale = torch.zeros((), dtype=torch.float64, device=image.device)

    if smoothing:  # what every image gets from the constants per column, and per unit of its own
        to_all = (cols.miss @ v.to(logits.dtype))[None]
        text_total = v.sum(0, dtype=logits.dtype)[None]

    room = u.new_empty((2 if has_cross else 1) * min(ROWS, logits.n) * min(COLS, logits.m))
    for at_rows in _blocks(logits.n, ROWS):
        height = at_rows.stop - at_rows.start
        through_s = accumulator(height, u.shape[1]) if need_rows else None
        through_a = accumulator(height, u.shape[1]) if has_cross and (need_image or need_scale) else None
        left = torch.cat([u[at_rows], operands["tu"][at_rows]]) if has_cross else u[at_rows]
        for at_cols in _blocks(logits.m, COLS):
            tile = _Tile(logits, positives, at_rows, at_cols, rows.references, cols.references)
            # ds above db, so that one product takes both to the text's gradient.
            stack = room[: len(left) * (at_cols.stop - at_cols.start)].view(len(left), -1)
            ds, db = stack[:height], stack[height:]
            at_hits = _student_gradient(tile, rows, cols, options, ds)
            if logits.has_margin and at_hits is not None:
                d_scale -= margin * at_hits
            if through_s is not None:
                _add_product(through_s, ds, v[at_cols].T)
            if through_a is not None:
                da = torch.empty_like(ds)
                _cross_gradient("a", tile, rows, options, da)
                _add_product(through_a, da, operands["tv"][at_cols].T)
            if d_text is not None:
                if has_cross:
                    _cross_gradient("b", tile, cols, options, db)
                _add_product(d_text[at_cols], stack.T, left.T)
        if through_s is not None and smoothing:
            through_s -= torch.addmm(to_all, rows.miss[at_rows, None], text_total)
        if need_scale and through_a is not None:
            d_scale += _dot(through_a, u[at_rows])
        if need_scale and not need_cols and through_s is not None:
            d_scale += _dot(through_s, u[at_rows])
        if d_image is not None and through_s is not None:
            d_image[at_rows] = logits.scale * (through_s if through_a is None else through_s.add_(through_a))
    if d_text is not None:
        if smoothing:
            d_text -= cols.miss[:, None] * u.sum(0, dtype=logits.dtype) + rows.miss @ u.to(logits.dtype)
        if need_scale:
            d_scale += _dot(d_text, v)
        d_text = d_text.mul_(logits.scale).to(text.dtype)
    return d_image, d_text if need_text else None, d_scale.to(logits.dtype) if need_scale else None


# ---------------------------------------------------------------------------------------------------
# What a tile is made from.


class _Logits:
    """Tiles of s, t, a, b in base 2 (times log2 e), in the accumulation dtype."""

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        teacher_image: Tensor | None,
        teacher_text: Tensor | None,
        teacher_scale: Tensor | None,
        margin: float,
    ) -> None:
        self.n, self.m = len(image), len(text)
        self.dtype = torch.promote_types(image.dtype, torch.float32)
        self.scale = scale.to(self.dtype)
        self.has_teacher, self.has_margin = teacher_image is not None, margin > 0
        self.shift = self.scale * (margin * _LOG2E)  # what the margin adds to a negative, σδ
        operand = _operand_dtype(image)
        features = {"u": image, "v": text, "tu": teacher_image, "tv": teacher_text}
        self.operands = {k: x.detach().to(operand).contiguous() for k, x in features.items() if x is not None}
        kappa = self.scale * _LOG2E
        self._factors = {"s": ("u", "v", kappa)}
        if teacher_scale is not None:
            teacher_kappa = teacher_scale.to(self.dtype) * _LOG2E
            self._factors |= {
                "a": ("u", "tv", kappa),
                "b": ("tu", "v", kappa),
                "t": ("tu", "tv", teacher_kappa),
            }
        self._rooms: dict[str, Tensor] = {}
        self._block: tuple[slice, dict[tuple[str, Tensor], Tensor]] = (slice(0, 0), {})

    def tile(self, name: str, at_rows: slice, at_cols: slice) -> Tensor:
        left, right, kappa = self._factors[name]
        if self._block[0] != at_rows:
            self._block = (at_rows, {})
        # The left operand carries the scale, one block of rows at a time. Rounding it once more, in low
        # precision, is lost in the rounding of the product.
        key = (left, kappa)
        if key not in self._block[1]:
            block = self.operands[left][at_rows]
            self._block[1][key] = (block.to(self.dtype) * kappa).to(block.dtype)
        room = partial(self._room, name, at_rows, at_cols)
        return _product(self._block[1][key], self.operands[right][at_cols], room)

    def _room(self, name: str, at_rows: slice, at_cols: slice) -> Tensor:
        """Memory of a tile, used again for the next of that name: fresh memory takes a quarter of a product."""
        height, width = at_rows.stop - at_rows.start, at_cols.stop - at_cols.start
        if name not in self._rooms:
            self._rooms[name] = self.scale.new_empty(min(ROWS, self.n) * min(COLS, self.m))
        return self._rooms[name][: height * width].view(height, width)

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        for at_rows in _blocks(self.n, ROWS):
            for at_cols in _blocks(self.m, COLS):
                yield at_rows, at_cols

    def shared_references(self) -> dict[str, float]:
        """One constant c for each matrix such that x − c <= _HIGHEST for unit vectors."""
        found = {name: max(0.0, float(kappa) - _HIGHEST) for name, (_, _, kappa) in self._factors.items()}
        return {**found, "z": found["s"]}

    def row_totals(self) -> Tensor:
        """Σ_j s_ij, [N], without the matrix."""
        u, v, kappa = self._factors["s"]
        return self.operands[u].to(self.dtype) @ (kappa * self.operands[v].sum(0, dtype=self.dtype))

    def col_totals(self) -> Tensor:
        """Σ_i s_ij, [M], without the matrix."""
        u, v, kappa = self._factors["s"]
        return self.operands[v].to(self.dtype) @ (kappa * self.operands[u].sum(0, dtype=self.dtype))


class _Hits(NamedTuple):
    """Positives inside a tile: places in the flattened tile, row and column in the whole matrix."""

    place: Tensor
    row: Tensor
    col: Tensor

    def along(self, direction: int) -> Tensor:
        return self.row if direction == _ROW else self.col


class _Positives:
    """Where labels agree: counts per row and per column, lists per tile."""

    def __init__(self, labels: Tensor | None, text_labels: Tensor | None, logits: _Logits) -> None:
        self._labels, self._text_labels = labels, text_labels
        self._device = logits.scale.device
        # How many each column and each row has, in the order of the directions 0 and 1.
        self.counts = (logits.scale.new_ones(logits.m), logits.scale.new_ones(logits.n))
        if labels is not None and text_labels is not None:
            of_columns, of_rows = (
                _count(text_labels, labels.sort().values),
                _count(labels, text_labels.sort().values),
            )
            self.counts = (of_columns[0].to(logits.dtype), of_rows[0].to(logits.dtype))

    def tile(self, at_rows: slice, at_cols: slice) -> _Hits | None:
        """The positives of one tile; None if there are none."""
        width = at_cols.stop - at_cols.start
        if self._labels is None or self._text_labels is None:
            low, high = max(at_rows.start, at_cols.start), min(at_rows.stop, at_cols.stop)
            if low >= high:
                return None
            row = col = torch.arange(low, high, device=self._device)
        else:
            ordered, order = self._text_labels[at_cols].sort()
            count, first = _count(self._labels[at_rows], ordered)
            row = torch.repeat_interleave(count)  # each row's index as often as it has positives
            if not len(row):
                return None
            nth = torch.arange(len(row), device=self._device) - (count.cumsum(0) - count)[row]
            col = order[first[row] + nth] + at_cols.start
            row += at_rows.start
        return _Hits((row - at_rows.start) * width + (col - at_cols.start), row, col)

    def agree(self, row: Tensor, col: Tensor) -> Tensor:
        """Whether row[k] and col[k] belong together."""
        if self._labels is None or self._text_labels is None:
            return row == col
        return self._labels[row] == self._text_labels[col]


def _count(labels: Tensor, ordered: Tensor) -> tuple[Tensor, Tensor]:
    """How often each label occurs in a sorted list, and where first."""
    first = torch.searchsorted(ordered, labels)
    return torch.searchsorted(ordered, labels, right=True) - first, first


def _target_weights(count: Tensor, others: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """Target probability of a positive and of a negative, for ``count`` positives among ``others``."""
    if smoothing == 0.0:
        return 1 / count, torch.zeros_like(count)
    miss = torch.where(count < others, smoothing / (others - count), 0.0)
    return (1 - miss * (others - count)) / count, miss


def _blocks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


# ---------------------------------------------------------------------------------------------------
# A tile, seen by both directions.


class _Options(NamedTuple):
    """Which matrices are visited, the teacher's first, and what is taken from each."""

    matrices: tuple[str, ...]
    kl: tuple[str, ...]  # matrices whose divergence from t is measured
    hits: tuple[str, ...]  # matrices whose sum over the positives is measured
    stats: bool

    @classmethod
    def of(cls, enabled: Sequence[bool], stats: bool, logits: _Logits) -> _Options:
        contrastive, relational, interactive, cross = enabled
        stats_of_teacher = stats and logits.has_teacher
        return cls(
            matrices=("t",) * (relational or cross or stats_of_teacher)
            + ("s",) * (contrastive or relational or stats)
            + ("a", "b") * (interactive or cross),
            kl=("s",) * (relational or stats_of_teacher) + ("a", "b") * cross,
            hits=("s",) * contrastive + ("a", "b") * interactive,
            stats=stats,
        )


class _Tile:
    """One tile of every logit matrix and of the exponentials exp2(x − reference), each made once.

    With shared references (one constant for each matrix) rows and columns share their exponentials, which
    then take the place of the logits except of those in ``keep``.
    """

    def __init__(
        self,
        logits: _Logits,
        positives: _Positives,
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
        self.hits = positives.tile(at_rows, at_cols)
        self._kept: dict[tuple[str, ...], Tensor] = {}

    def at(self, direction: int) -> slice:
        """The part of the rows (columns) that the tile covers."""
        return self._at[direction]

    def x(self, name: str) -> Tensor:
        """Logits in base 2."""
        key = ("x", name)
        if key not in self._kept:
            if name == "z":
                z = self.x("s") + self._logits.shift
                if self.hits:
                    z.view(-1)[self.hits.place] = self.at_hits(self.x("s"))
                self._kept[key] = z
            else:
                self._kept[key] = self._logits.tile(name, self._at[_ROW], self._at[_COL])
        return self._kept[key]

    def e(self, name: str, direction: int) -> Tensor:
        """exp2(x − reference)."""
        key = ("e", name) if self.shared else ("e", name, str(direction))
        if key not in self._kept:
            x, reference = self.x(name), self._references[direction][name]
            if isinstance(reference, Tensor):
                x = x - self.spread(reference, direction)
            elif name in self._keep:
                x = x - reference
            else:
                del self._kept["x", name]
                x = x.sub_(reference) if reference else x
            self._kept[key] = x.exp2_()
        return self._kept[key]

    def x_at_hits(self, name: str) -> Tensor:
        """Logits at the positives."""
        key = ("x_at_hits", name)
        if key not in self._kept:
            self._kept[key] = self.at_hits(self.x(name))
        return self._kept[key]

    def gap(self, name: str, direction: int) -> Tensor:
        """exp2(t − reference) (t − x)."""
        key = ("gap", name) if self.shared else ("gap", name, str(direction))
        if key not in self._kept:
            self._kept[key] = (self.x("t") - self.x(name)).mul_(self.e("t", direction))
        return self._kept[key]

    def spread(self, values: Tensor, direction: int) -> Tensor:
        """The tile's part of a vector over the rows (columns), ready to be broadcast."""
        return values[self._at[direction]].unsqueeze(direction)

    def at_hits(self, tile: Tensor) -> Tensor:
        """Values of a tile at the positives."""
        assert self.hits is not None
        return tile.view(-1)[self.hits.place]


# ---------------------------------------------------------------------------------------------------
# Forward: sums of rows and columns.


class _Side:
    """Sums over every row (direction 1) or every column (direction 0), filled tile by tile."""

    def __init__(self, direction: int, positives: _Positives, others: int, references: References) -> None:
        self._direction = direction
        self.others = others  # summands
        self.positives = positives.counts[direction]
        self._references = references
        self._sums: dict[str, Tensor] = {}
        self._best: dict[str, tuple[Tensor, Tensor]] = {}
        self.lse: dict[str, Tensor] = {}
        self.exact = False

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(self.positives)
        return self._sums[name]

    def visit(self, tile: _Tile, options: _Options, margin: bool) -> None:
        mine = self._direction
        for name in options.matrices:
            if mine not in _DIRECTIONS[name]:
                continue
            if name in options.kl:
                self._reduce(f"kl/{name}", tile, tile.gap(name, mine))
            if name in options.hits and tile.hits:
                self._scatter(f"positive/{name}", tile.hits, tile.x_at_hits(name))
            e = tile.e(name, mine)
            if options.stats and name in ("s", "t"):
                self._track_best(name, tile)
                self._reduce(f"first/{name}", tile, e * tile.x(name))
            if name != "s" or not (margin and tile.shared):
                self._reduce(name, tile, e)
            if name == "s" and margin and not tile.shared:
                self._reduce("z", tile, tile.e("z", mine))
            if tile.hits and ((name == "s" and (margin or options.stats)) or (name == "t" and options.stats)):
                self._scatter(f"hit/{name}", tile.hits, tile.at_hits(e))

    def visit_negatives(self, tile: _Tile) -> None:
        """Sum the negatives alone. Their exponentials are what is left of s afterwards."""
        e = tile.e("s", self._direction)
        if tile.hits:
            e.view(-1)[tile.hits.place] = 0.0
        self._reduce("negative", tile, e)

    def _reduce(self, name: str, tile: _Tile, values: Tensor) -> None:
        self[name][tile.at(self._direction)] += values.sum(self._direction)

    def _scatter(self, name: str, hits: _Hits, values: Tensor) -> None:
        self[name].index_add_(0, hits.along(self._direction), values)

    def _track_best(self, name: str, tile: _Tile) -> None:
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
            self._sums["s"] = self["negative"] + self["hit/s"]
        logs = {name: self._sums[name].log2() for name in _DIRECTIONS if name in self._sums}
        checked = dict(logs)
        if "negative" in self._sums:
            logs["z"] = torch.logaddexp2(self["negative"].log2() + shift, self["hit/s"].log2())
            checked["z"] = logs["z"] - shift
        low, high = torch.cat(list(checked.values())).aminmax()
        # A sum whose summands carry a logit as factor overflows before the plain one does.
        weighted = [x for name, x in self._sums.items() if name.startswith(("kl/", "first/"))]
        finite = not weighted or bool(torch.cat(weighted).isfinite().all())
        self.exact = finite and bool(low >= _LOWEST) and bool(high < math.inf)
        for name, log in logs.items():
            self.lse[name] = log + self._references[name]
        if "s" in self.lse:
            self.lse.setdefault("z", self.lse["s"])

    def kl(self, name: str) -> Tensor:
        """KL(softmax t ‖ softmax of ``name``) in bits."""
        return self[f"kl/{name}"] / self["t"] - self.lse["t"] + self.lse[name]

    def saved(self, x: str) -> Tensor:
        """What backward needs; NaN in place of a log-sum-exp whose row (column) has no target."""
        missing = torch.zeros_like(self.positives)
        stats = torch.stack([self.lse.get(name, missing) for name in ("z", "s", "t", x)] + [self.positives])
        stats[0:4:3].masked_fill_(self.positives == 0, math.nan)
        return stats

    def predictions(self, name: str) -> Tensor:
        """Index of the largest logit."""
        return self._best[name][1]

    def diagnostics(self, name: str, positives: _Positives) -> list[Tensor]:
        """Mean entropy, confidence, probability of the positives and accuracy, as eager.stat_names lists."""
        best, place = self._best[name]
        entropy = _LN2 * (self.lse[name] - self[f"first/{name}"] / self[name])
        confidence = (best - self.lse[name]).exp2()
        hit = self[f"hit/{name}"] / self[name]
        at = torch.arange(len(place), device=place.device)
        right = positives.agree(at, place) if self._direction == _ROW else positives.agree(place, at)
        return [x.mean() for x in (entropy, confidence, hit, right.to(hit.dtype))]


def _sums(
    logits: _Logits,
    positives: _Positives,
    options: _Options,
    row_references: References,
    col_references: References,
) -> tuple[_Side, _Side]:
    """One visit to every tile."""
    rows = _Side(_ROW, positives, logits.m, row_references)
    cols = _Side(_COL, positives, logits.n, col_references)
    keep = ("t", "s") if options.stats else ("t",)
    for at_rows, at_cols in logits.tiles():
        tile = _Tile(logits, positives, at_rows, at_cols, row_references, col_references, keep)
        for side in (rows, cols):
            side.visit(tile, options, logits.has_margin)
        if logits.has_margin and tile.shared:
            for side in (rows, cols):
                side.visit_negatives(tile)
    for side in (rows, cols):
        side.close(logits.shift)
    return rows, cols


def _maxima(logits: _Logits, positives: _Positives, options: _Options) -> tuple[References, References]:
    """Exact maxima of the rows and columns of every matrix: references that no logits can defeat."""
    names = options.matrices + ("z",) * logits.has_margin
    best = tuple(
        {name: torch.full_like(size, -math.inf) for name in names if direction in _DIRECTIONS[name]}
        for direction, size in enumerate(positives.counts)
    )
    for at_rows, at_cols in logits.tiles():
        tile = _Tile(logits, positives, at_rows, at_cols, best[_ROW], best[_COL])
        for direction, maxima in enumerate(best):
            for name, values in maxima.items():
                mine = values[tile.at(direction)]
                torch.maximum(mine, tile.x(name).amax(direction), out=mine)
    return best[_ROW], best[_COL]


def _diagnostics(rows: _Side, cols: _Side, positives: _Positives, logits: _Logits) -> Tensor:
    """The numbers that ``eager.stat_names`` lists, in its order."""
    values = []
    for name in ("s", "t") if logits.has_teacher else ("s",):
        values += rows.diagnostics(name, positives) + cols.diagnostics(name, positives)
    if logits.has_teacher:
        for side in (rows, cols):
            same = side.predictions("s") == side.predictions("t")
            values += [same.to(logits.dtype).mean(), _LN2 * side.kl("s").mean()]
    return torch.stack(values)


# ---------------------------------------------------------------------------------------------------
# Backward: gradients of tiles.


class _Slopes:
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
        logits: _Logits,
        smoothing: float,
        options: _Options,
        references: References | None,
    ) -> None:
        x = "a" if direction == _ROW else "b"
        lse = dict(zip(("z", "s", "t", x), stats[:4], strict=True))
        count, others = stats[4], logits.m if direction == _ROW else logits.n
        enabled = ("s" in options.hits, "s" in options.kl, x in options.hits, x in options.kl)
        contrastive, relational, interactive, cross = (
            grad if on else torch.zeros_like(grad) for grad, on in zip(grads.unbind(), enabled, strict=True)
        )
        hit, miss = _target_weights(count, others, smoothing)
        self.direction, self.smoothed = direction, smoothing > 0
        self.target, self.miss, self.cross_target = contrastive * hit, contrastive * miss, interactive / count
        self.exact = True
        self.references: References = lse if references is None else references
        step = {name: self.references[name] - lse[name] for name in lse if name in self.references}
        if references is not None:
            used = [name for name in options.matrices if direction in _DIRECTIONS[name]]
            checked = [step[name] for name in used] + [step["z"] + logits.shift]
            low, high = torch.cat(checked).aminmax()
            # Far below, a slope, which has 1/N as another factor, would be a subnormal number.
            self.exact = bool(low >= -_HIGHEST - _SUMMANDS) and bool(high <= -_LOWEST)
        self.z = contrastive * step["z"].exp2()
        self.s = relational * step["s"].exp2()
        self.negative = self.s + contrastive * (step["z"] + logits.shift).exp2()
        self.hit = self.s + self.z
        if "t" in step:
            self.t, self.t_cross = relational * step["t"].exp2(), cross * step["t"].exp2()
        if x in step:
            self.cross = (interactive + cross) * step[x].exp2()


def _student_gradient(
    tile: _Tile, rows: _Slopes, cols: _Slopes, options: _Options, out: Tensor
) -> Tensor | None:
    """Write d/ds, without the constants of the smoothing, to ``out``.

    Returns the sum of d/dz over the positives of the tile, None if there are none.
    """
    hits, at_hits = tile.hits, None
    if tile.shared:
        e = tile.e("s", _ROW)
        before = tile.at_hits(e) if hits else None
        ds = torch.add(
            tile.spread(rows.negative, _ROW), tile.spread(cols.negative, _COL), out=_if_same(out, e)
        ).mul_(e)
        if hits and before is not None:
            at_hits = before * (rows.z[hits.row] + cols.z[hits.col])
            ds.view(-1)[hits.place] = before * (rows.hit[hits.row] + cols.hit[hits.col])
    else:
        ds = tile.e("z", _ROW) * tile.spread(rows.z, _ROW)
        ds.addcmul_(tile.e("z", _COL), tile.spread(cols.z, _COL))
        at_hits = tile.at_hits(ds) if hits else None
        if "s" in options.kl:
            for side in (rows, cols):
                ds.addcmul_(tile.e("s", side.direction), tile.spread(side.s, side.direction))
    if hits and at_hits is not None:
        target = rows.target[hits.row] + cols.target[hits.col]
        correction = target - rows.miss[hits.row] - cols.miss[hits.col] if rows.smoothed else target
        ds.view(-1).index_add_(0, hits.place, correction, alpha=-1)
        at_hits = (at_hits - target).sum(dtype=torch.float64)
    if "s" in options.kl:
        if tile.shared:
            both = tile.spread(rows.t, _ROW) + tile.spread(cols.t, _COL)
            ds.addcmul_(tile.e("t", _ROW), both, value=-1)
        else:
            for side in (rows, cols):
                ds.addcmul_(tile.e("t", side.direction), tile.spread(side.t, side.direction), value=-1)
    if ds.data_ptr() != out.data_ptr():
        out.copy_(ds)
    return at_hits


def _cross_gradient(name: str, tile: _Tile, side: _Slopes, options: _Options, out: Tensor) -> None:
    """Write d/da, over rows, or d/db, over columns, to ``out``."""
    mine = side.direction
    e = tile.e(name, mine)
    d = torch.mul(e, tile.spread(side.cross, mine), out=_if_same(out, e))
    if name in options.kl:
        d.addcmul_(tile.e("t", mine), tile.spread(side.t_cross, mine), value=-1)
    if name in options.hits and tile.hits:
        d.view(-1).index_add_(0, tile.hits.place, side.cross_target[tile.hits.along(mine)], alpha=-1)
    if d.data_ptr() != out.data_ptr():
        out.copy_(d)


def _if_same(out: Tensor, e: Tensor) -> Tensor:
    """``out`` if it has the dtype of the tile's arithmetic, else room for it."""
    return out if out.dtype == e.dtype else torch.empty_like(e)


# ---------------------------------------------------------------------------------------------------
# Helpers.


def _product(a: Tensor, b: Tensor, room: Callable[[], Tensor]) -> Tensor:
    """a @ b.T, in ``room()`` if that saves memory; a [m, k] and b [n, k] row-contiguous or transposes of such."""
    if _mkldnn_is_faster(a):  # which can't write into memory that is there
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    out = room()
    return torch.mm(a, b.T, out=out) if out.dtype == a.dtype else out.copy_(a @ b.T)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b.T to ``total``, as :func:`_product`."""
    if _mkldnn_is_faster(a):
        total += torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    elif total.dtype != a.dtype:
        total += a @ b.T
    else:
        total.addmm_(a, b.T)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a∘b of two matrices in float64, a block at a time so that no product of their size is stored."""
    blocks = [(a[at] * b[at]).sum(dtype=torch.float64) for at in _blocks(len(a), ROWS)]
    return torch.stack(blocks).sum()


def _operand_dtype(image: Tensor) -> torch.dtype:
    """The dtype of the products.

    float16 is widened: its gradient tiles (about 1/N²) would underflow. So is bfloat16 on a CPU that has
    no instructions for it, where it would only be slower.
    """
    if image.dtype == torch.float16:
        return torch.float32
    if image.dtype == torch.bfloat16 and image.device.type == "cpu" and bfloat16_unit() is None:
        return torch.float32
    return image.dtype


def _mkldnn_is_faster(a: Tensor) -> bool:
    return a.dtype == torch.float32 and a.device.type == "cpu" and not _mkl_knows_this_processor()


@cache
def _mkl_knows_this_processor() -> bool:
    """MKL takes its AVX-512 kernels on Intel's processors only."""
    cpuinfo = Path("/proc/cpuinfo")
    intel = cpuinfo.is_file() and "GenuineIntel" in cpuinfo.read_text()
    return (intel and torch.backends.mkl.is_available()) or not torch.backends.mkldnn.is_available()
