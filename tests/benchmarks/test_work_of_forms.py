"""Products of the forms of the contrastive term, counted in Triton's interpreter: the floors, and no more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode
from triton_interpreter import HAS_GPU

from benchmarks.work import counting
from tracer.kernels import _tiles, contrastive_blocked, contrastive_triton, sigmoid_blocked, sigmoid_triton
from tracer.kernels._tiles import Tile
from tracer.kernels.contrastive import Biases, Inputs, Needs, Options
from tracer.kernels.sigmoid import PairNeeds
from tracer.ops import contrastive_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(HAS_GPU, reason="work is counted in the interpreter"),
]

IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # torch counts addmm alone
N, D, TILE = 128, 32, Tile(32, 32, 32, 4, 1)
ONE_WAY = Options(image_to_text=1.0, text_to_image=0.0)
ALL_TERMS = {"relational": True, "interactive": True, "cross": True}


def inputs() -> Inputs:
    x = F.normalize(torch.randn(N, D, generator=torch.Generator().manual_seed(0)), dim=1)
    scale = torch.tensor(10.0)
    return Inputs(x, x.flip(0), scale, x, x.flip(0), scale)


def units(work, products) -> float:
    return (work.flops + products.get_total_flops()) / (2 * N * N * D)


@pytest.mark.parametrize(
    ("options", "needs", "floor"),
    [
        (ONE_WAY, Needs(), 4),
        (ONE_WAY, Needs(image=False), 3),  # LiT: a locked image tower
        (Options(), Needs(image=False), 3),
        (ONE_WAY._replace(**ALL_TERMS), Needs(), 9),
        (Options(**ALL_TERMS, ignore=True), Needs(), 12),
    ],
    ids=["one direction", "LiT", "a locked tower", "all terms in one direction", "all terms, rows left out"],
)
def test_products_with_softmaxes(options, needs, floor):
    with counting() as work, FlopCounterMode(display=False, custom_mapping=IN_PLACE) as products:
        saved = contrastive_triton.forward(inputs(), options, tile=TILE).saved
        contrastive_triton.backward(torch.ones(4), inputs(), saved, options, needs, tile=TILE)
    assert units(work, products) == floor


@pytest.mark.parametrize(
    ("relational", "needs", "floor"),
    [
        (False, PairNeeds(*[True] * 5), 3),
        (False, PairNeeds(True, False, True, True, True), 2),  # a locked tower
        (False, PairNeeds(), 1),
        (True, PairNeeds(False, *[True] * 4), 4),  # the second walk, of the backward pass
    ],
    ids=["both towers", "a locked tower", "no gradient", "with the relational term"],
)
def test_products_of_a_sigmoid(relational, needs, floor):
    options, biases = (
        Options(sigmoid=True, relational=relational),
        Biases(torch.tensor(-5.0), torch.tensor(-5.0)),
    )
    with counting() as work, FlopCounterMode(display=False, custom_mapping=IN_PLACE) as products:
        sigmoid_triton.walk(inputs(), biases, options, needs, tile=TILE)
    assert units(work, products) == floor
    assert work.launches == 1


@pytest.mark.parametrize(("stats", "floor"), [(False, 3), (True, 4)])
def test_diagnostics_of_a_sigmoid_cost_one_product(stats, floor, monkeypatch):
    """The logits of their softmaxes, and no backward walk for gradients of 0."""
    done = []
    for module, name in (
        (sigmoid_blocked, "walk"),
        (contrastive_blocked, "forward"),
        (contrastive_blocked, "backward"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name), done))
    leaves = [x.double().requires_grad_() for x in inputs()[:2]]
    form = {"contrast": "sigmoid", "logit_bias": -5.0, "impl": "blocked", "stats": stats}
    contrastive_loss(*leaves, 10.0, **form).loss.backward()
    assert sum(done) / (2 * N * N * D) == floor


@pytest.mark.parametrize("impl", ["blocked", "triton"])
@pytest.mark.parametrize(
    ("terms", "floor"),
    [("interactive", 9), ("cross", 11), ("relational interactive cross", 14)],
)
def test_terms_with_softmaxes_beside_a_sigmoid_leave_s_alone(impl, terms, floor, monkeypatch):
    """Regression: the blocked walk formed s, and took the products of a gradient of 0 to both features."""
    done, sigmoid, softmax = [], *MODULES[impl]
    for module, name in ((sigmoid, "walk"), (softmax, "forward"), (softmax, "backward")):
        monkeypatch.setattr(module, name, counted(getattr(module, name), done))
    monkeypatch.setattr(_tiles, "choose", lambda *_: TILE)  # which divides N and D
    given = inputs()
    dtype = torch.float64 if impl == "blocked" else torch.float32
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in given[:2]]
    form = {"contrast": "sigmoid", "logit_bias": -5.0, "margin": 0.1, "impl": impl}
    form |= {"teacher_image": leaves[1].detach(), "teacher_text": leaves[0].detach()}
    with counting() as work:
        contrastive_loss(*leaves, 10.0, **form, **dict.fromkeys(terms.split(), 0.5)).loss.backward()
    assert (work.flops + sum(done)) / (2 * N * N * D) == floor


MODULES = {
    "blocked": (sigmoid_blocked, contrastive_blocked),
    "triton": (sigmoid_triton, contrastive_triton),
}


def counted(call, done):
    """Return the call, which adds the operations of its products to a list."""

    def counting_call(*arguments, **options):
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as products:
            result = call(*arguments, **options)
        done.append(products.get_total_flops())
        return result

    return counting_call


def test_one_direction_does_less_elementwise_work():
    """No column statistics: fewer operations, exponentials and bytes than both directions take."""
    works = []
    for options in (ONE_WAY, Options()):
        with counting() as work:
            saved = contrastive_triton.forward(inputs(), options, tile=TILE).saved
            contrastive_triton.backward(torch.ones(4), inputs(), saved, options, Needs(), tile=TILE)
        works.append(work)
    one, both = works
    assert one.exponentials < 0.6 * both.exponentials
    assert one.operations < 0.75 * both.operations
    assert one.loaded + one.stored < both.loaded + both.stored
