"""Statistics of rectangles, merged: the result of the whole matrix, whichever implementation computed them."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_calls import ALL, FULL, by_definition, options, problem, to_device
from three_runs import SLACK, assert_no_worse
from torch import Tensor

from tracer.kernels import _statistics, contrastive_blocked, contrastive_triton
from tracer.kernels._statistics import Side, Whole
from tracer.kernels.contrastive import Inputs, Options, Saved

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
IMPLEMENTATIONS = {"blocked": contrastive_blocked, "triton": contrastive_triton}
# Cuts of 37 rows and 50 columns; one part is a single row, one is empty.
ROWS, COLS = (0, 1, 20, 20, 37), (0, 30, 50)


def rectangle(inputs: Inputs, rows: slice, cols: slice) -> Inputs:
    """Return the inputs of a part of the matrix."""

    def cut(x: Tensor | None, at: slice) -> Tensor | None:
        return None if x is None else x[at]

    return inputs._replace(
        image=inputs.image[rows], teacher_image=cut(inputs.teacher_image, rows), labels=cut(inputs.labels, rows),
        text=inputs.text[cols], teacher_text=cut(inputs.teacher_text, cols),
        text_labels=cut(inputs.text_labels, cols),
    )  # fmt: skip


def slices(ends: tuple[int, ...]) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def statistics(module, inputs: Inputs, chosen: Options, at: tuple[slice, slice]) -> tuple[Side, Side]:
    names = _statistics.statistic_names(chosen, inputs.has_teacher)
    part = rectangle(inputs, *at)
    if not len(part.image):
        like = part.logit_scale
        return _statistics.nothing(0, names, like), _statistics.nothing(len(part.text), names, like)
    sides = module.statistics(part, chosen)
    for side, other in zip(sides, reversed(at), strict=True):  # indices are those of the whole matrix
        for name in ("arg_s", "arg_t"):
            if name in side:
                side[name] = side[name] + other.start
    return tuple(_statistics.unpack(_statistics.pack(side, names, torch.float32), names) for side in sides)


def merged(sides: list[Side]) -> Side:
    return _statistics.merge({name: torch.stack([side[name] for side in sides]) for name in sides[0]})


@pytest.mark.parametrize("stats", [False, True], ids=["plain", "stats"])
@pytest.mark.parametrize("terms", [FULL, FULL[:1], FULL[:2]], ids=["full", "clip", "relational"])
@pytest.mark.parametrize(("margin", "smoothing"), [(0.0, 0.0), (0.1, 0.2)], ids=["hard", "soft"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rectangles_make_the_whole(impl, margin, smoothing, terms, stats):
    """A row of the matrix whose parts were computed apart, one part empty, is that of the whole matrix."""
    module, chosen = IMPLEMENTATIONS[impl], options(margin, smoothing, terms, stats=stats)
    exact = problem(ROWS[-1], COLS[-1], 16)
    inputs = to_device(exact)
    whole = Whole(ROWS[-1], COLS[-1])
    at = [[(rows, cols) for cols in slices(COLS)] for rows in slices(ROWS)]
    parts = [[statistics(module, inputs, chosen, rectangle) for rectangle in line] for line in at]
    lines = [merged([rows for rows, _ in line]) for line in parts]
    columns = [merged([line[k][1] for line in parts]) for k in range(len(parts[0]))]
    rows, cols = ({n: torch.cat([side[n] for side in sides]) for n in lines[0]} for sides in (lines, columns))
    shift = inputs.logit_scale.double() * (margin / _statistics.LN2)
    got = _statistics.result(rows, cols, shift, chosen, whole)
    saved = Saved(got.row_stats.float(), got.col_stats.float())

    upstream = torch.tensor([1.0, 0.5, 2.0, 0.25], device=inputs.image.device)
    image, text, scale = torch.zeros_like(inputs.image), torch.zeros_like(inputs.text), 0.0
    for line in at:
        for r, c in line:
            if r.start == r.stop:
                continue
            final = Saved(saved.row_stats[:, r], saved.col_stats[:, c])
            grads = module.backward(upstream, rectangle(inputs, r, c), final, chosen, ALL, whole)
            image[r] += grads.image
            text[c] += grads.text
            scale = scale + grads.logit_scale

    ours = {
        "terms": got.terms,
        "diagnostics": got.diagnostics,
        "image": image,
        "text": text,
        "logit_scale": scale,
    }
    truth, by_torch = by_definition(exact, chosen, upstream), by_definition(inputs, chosen, upstream)
    assert_no_worse(ours, by_torch, truth, SLACK[torch.float32])
