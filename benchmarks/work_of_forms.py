"""The work of the forms of the contrastive term, counted as in ``benchmarks/work.py``, of which it is a part.

A form is a sigmoid of each pair, one direction, or a tower that asks for no gradient. memeff's LiT loss stands
beside ours. Its images are locked, and its temperature is a number. Its results must agree with the definition.
``benchmarks/others.py`` counts memeff's CLIP loss and siglip-kernel's sigmoid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import packages, published
from benchmarks.counting import Work, counting
from benchmarks.harness import table
from benchmarks.measure import require_close
from tracer.kernels import contrastive_triton, sigmoid_triton
from tracer.kernels._tiles import TABLES, Tile, tiles_of
from tracer.kernels._triton import planning_for
from tracer.kernels.contrastive import Biases, Inputs, Needs, Options
from tracer.kernels.sigmoid import PairNeeds

ROWS, WIDTH = 256, 64  # products per pair and width are the same at every size
SCALE = 20.0
OURS = "TRACER"
PASSES = ("forward", "backward")
ADDMM_IN_PLACE = {
    torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]
}  # torch counts addmm alone


class Form(NamedTuple):
    """A form whose work is counted: what it computes, of what it takes gradients, and the products it needs."""

    options: Options
    image: bool  # whether the image tower gets a gradient
    floor: int


ONE_WAY = Options(image_to_text=1.0, text_to_image=0.0)
TERMS = {"relational": True, "interactive": True, "cross": True}
LIT = "LiT: one direction, images locked"
FORMS = {
    "both directions, images locked": Form(Options(), False, 3),
    "one direction": Form(ONE_WAY, True, 4),
    LIT: Form(ONE_WAY, False, 3),
    "whole objective in one direction": Form(ONE_WAY._replace(**TERMS), True, 9),
    "sigmoid": Form(Options(sigmoid=True), True, 3),
    "sigmoid, images locked": Form(Options(sigmoid=True), False, 2),
    "sigmoid and its relational term": Form(Options(sigmoid=True, relational=True), True, 6),
}


def count_forms(architecture: str, places: int) -> list[dict[str, Any]]:
    """Return the work of every form of ours, and of memeff's LiT loss, in a process that interprets."""
    with planning_for(architecture, places):
        rows = [
            _row(name, OURS, architecture, _ours(form, architecture), form.floor)
            for name, form in FORMS.items()
        ]
    with packages.as_if_on(architecture, places):
        return [*rows, _row(LIT, packages.MEMEFF, architecture, _memeff(), FORMS[LIT].floor)]


def _row(name: str, who: str, architecture: str, passes: Iterator[None], floor: int) -> dict[str, Any]:
    done: dict[str, Work] = {}
    units: dict[str, float] = {}
    for when in PASSES:
        with counting() as work, FlopCounterMode(display=False, custom_mapping=ADDMM_IN_PLACE) as products:
            next(passes)
        done[when] = work
        units[when] = (work.flops + products.get_total_flops()) / (2 * ROWS**2 * WIDTH)
    next(passes, None)  # its checks, which are not counted
    return {
        "form": name,
        "who": who,
        "architecture": architecture,
        "rows": ROWS,
        "width": WIDTH,
        "units": units,
        "floor": floor,
        "bytes": {when: work.loaded + work.stored for when, work in done.items()},
        "launches": {when: work.launches for when, work in done.items()},
    }


def _features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, ROWS, WIDTH, generator=generator)
    image, text = (torch.nn.functional.normalize(x, dim=1).half() for x in (image, image / 4 + noise))
    return image, text


def _ours(form: Form, architecture: str) -> Iterator[None]:
    """Make the forward and the backward pass of our launchers, and yield after each."""
    scale, (image, text), options = torch.tensor(SCALE), _features(), form.options
    inputs = Inputs(image, text, scale)
    if options.relational or options.crossed:
        inputs = inputs._replace(teacher_image=image, teacher_text=text, teacher_logit_scale=scale)
    many = options.relational or options.crossed

    def tile(kernel: str) -> Tile:
        # The inner blocks are widened to D: fewer, larger steps of the same work.
        return tiles_of(TABLES[architecture], kernel, many, 16)[0]._replace(block_d=WIDTH)

    if options.sigmoid:
        yield from _sigmoid(form, inputs, tile("sigmoid"))
        return
    way = ", one way" if options.one_way else ""
    saved = contrastive_triton.forward(inputs, options, tile=tile(f"forward{way}")).saved
    yield
    needs = Needs(image=form.image)
    contrastive_triton.backward(torch.ones(4), inputs, saved, options, needs, tile=tile(f"backward{way}"))
    yield


def _sigmoid(form: Form, inputs: Inputs, tile: Tile) -> Iterator[None]:
    """Walk as ``tracer/_sigmoid.py`` does: one term's gradients are made forward, those of two backward."""
    bias = torch.tensor(-10.0)
    biases = Biases(bias, bias if form.options.relational else None)
    gradients = PairNeeds(True, form.image, True, True, True)
    forward = PairNeeds() if form.options.relational else gradients
    sigmoid_triton.walk(inputs, biases, form.options, forward, tile=tile)
    yield
    if form.options.relational:
        again = gradients._replace(sums=False)
        sigmoid_triton.walk(inputs, biases, form.options, again, torch.ones(4), tile=tile)
    yield


def _memeff() -> Iterator[None]:
    """Make both passes of memeff's LiT loss, yield after each, and compare its results with the definition."""
    image, text = _features()
    text.requires_grad_()
    loss = packages.memeff_lit_loss(image, text, 1 / SCALE)
    yield
    (got,) = torch.autograd.grad(loss, text)
    yield
    exact = text.detach().double().requires_grad_()
    right = published.lit_loss(image.double(), exact, torch.tensor(SCALE).double())
    (wanted,) = torch.autograd.grad(right, exact)
    require_close("loss of memeff's LiT", loss.detach(), right.detach(), 2e-3)
    require_close("text gradient of memeff's LiT", got, wanted, 2e-3)


def report_forms(rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    header = [
        "form",
        "kernels of",
        "tiles of",
        "N",
        "D",
        "products forward",
        "backward",
        "sum",
        "floor",
        "launches",
    ]
    return table(
        header,
        [
            [
                *(str(row[name]) for name in ("form", "who", "architecture", "rows", "width")),
                *(f"{row['units'][when]:.2f}" for when in PASSES),
                f"{sum(row['units'].values()):.2f}",
                str(row["floor"]),
                " + ".join(str(row["launches"][when]) for when in PASSES),
            ]
            for row in rows
        ],
    )


def exact_forms(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return every count by name."""
    return {
        f"work {row['form']}, {row['who']}, {row['architecture']} {what} {when}": value
        for row in rows
        for what in ("units", "bytes", "launches")
        for when, value in row[what].items()
    }
