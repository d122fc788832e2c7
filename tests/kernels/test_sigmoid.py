"""The sigmoid form: the definition against loops over numbers, and both walks against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_calls import CLIP, FULL, SIZES, problem, to_device
from loss_calls import small_tiles  # noqa: F401
from sigmoid_calls import ALL, UPSTREAM, WALKS, biases, by_definition, by_walk, check, pairwise
from three_runs import SLACK, error
from triton_interpreter import DEVICE

from tracer.kernels import _blocked_tile, contrastive_eager, sigmoid_blocked
from tracer.kernels.contrastive import TERMS, Biases, Inputs, Options
from tracer.kernels.sigmoid import PairNeeds

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("small_tiles"),
]


def test_the_definition_equals_the_loops():
    inputs, b = problem(6, 9, 8), biases()
    labels, text_labels = inputs.labels, inputs.text_labels
    contrastive = relational = 0.0
    p = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    for i in range(6):
        for j in range(9):
            dot = float(inputs.image[i] @ inputs.text[j])
            is_positive = bool(labels[i] == text_labels[j])
            z = 10 * (dot + 0.2 * (not is_positive)) - 4
            contrastive += math.log1p(math.exp(-z if is_positive else z)) / 6
            s, t = 10 * dot - 4, 8 / 1.5 * float(inputs.teacher_image[i] @ inputs.teacher_text[j]) - 3
            relational += (p(t) * math.log(p(t) / p(s)) + p(-t) * math.log(p(-t) / p(-s))) / 6
    terms, _ = contrastive_eager.contrastive_terms(inputs, pairwise(teacher_temperature=1.5), b)
    assert terms.tolist() == pytest.approx([contrastive, relational, 0.0, 0.0], rel=1e-12)


def test_the_definition_by_hand():
    """Two orthogonal pairs without a scale's help: logits σ − σ on the diagonal, −σ elsewhere."""
    eye, sigma = torch.eye(2, dtype=torch.float64), torch.tensor(math.log(3.0), dtype=torch.float64)
    chosen = Options(sigmoid=True)
    terms, _ = contrastive_eager.contrastive_terms(Inputs(eye, eye, sigma), chosen, Biases(-sigma))
    assert terms[0].item() == pytest.approx(math.log(2) + math.log(4 / 3), abs=1e-15)
    same = Inputs(eye, eye, sigma, eye, eye, sigma)
    terms, _ = contrastive_eager.contrastive_terms(same, pairwise(), Biases(-sigma, -sigma))
    assert abs(terms[1]) < 1e-15


def test_gradients_of_the_definition():
    inputs, b = problem(4, 5, 3, labels=(torch.arange(4) % 2, torch.arange(5) % 3)), biases(-1.0, 0.5)

    def terms(image, text, scale, bias):
        made = inputs._replace(image=image, text=text, logit_scale=scale)
        return contrastive_eager.contrastive_terms(made, pairwise(), b._replace(logit_bias=bias))[0]

    leaves = [x.clone().requires_grad_() for x in (*inputs[:3], b.logit_bias)]
    assert torch.autograd.gradcheck(terms, leaves)
    assert torch.autograd.gradgradcheck(terms, leaves)


@pytest.mark.parametrize("impl", WALKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_both_terms(impl, size):
    check(impl, problem(*size), biases(), pairwise(teacher_temperature=1.25))


@pytest.mark.parametrize("impl", WALKS)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_siglip_alone(impl, margin, labelled):
    inputs = problem(37, 37, 24, labels="some" if labelled else None, teacher=False)
    check(impl, inputs, biases(), pairwise(CLIP, margin), upstream=None)


def test_float64():
    """The blocked walk gives the definition's digits; the kernels take no float64."""
    inputs, b = problem(33, 45, 16), biases()
    got = sigmoid_blocked.walk(inputs, b, pairwise(), ALL, UPSTREAM)
    for name, truth in by_definition(inputs, b, pairwise()).items():
        assert error(getattr(got, name), truth) < 1e-12, name


@pytest.mark.parametrize("impl", WALKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(impl, dtype):
    check(impl, problem(70, 50, 48, dtype=dtype), biases(), pairwise(), dtype=dtype)


def test_half_precision_keeps_small_probabilities():
    """Probabilities of 2^−29, below half's smallest number, and upstream gradients far below that."""
    inputs = problem(64, 64, 16, dtype=torch.float16, labels=None, teacher=False, scale=1.0)
    chosen, b, tiny = pairwise(CLIP, 0.0), biases(-20.0), UPSTREAM * 2.0**-20
    labels = torch.arange(64)
    inputs = inputs._replace(labels=labels, text_labels=labels + 64)  # no positive: all that counts is small
    truth = by_definition(inputs, b, chosen, tiny)
    got = by_walk("triton", inputs, b, chosen, torch.float16, upstream=tiny)
    for name, exact in truth.items():
        ours = getattr(got, name).double().cpu()
        assert (ours - exact).norm() < 2e-3 * exact.norm(), name


@pytest.mark.parametrize("impl", WALKS)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits(impl, scale):
    """Logits of ±1e4 carry errors of 1e-3 in float32; certain pairs cost nothing or their logit."""
    check(impl, problem(40, 36, 16, scale=scale), biases(), pairwise(), slack=5e-3)


@pytest.mark.parametrize("impl", WALKS)
def test_small_losses_keep_their_digits(impl):
    """Every pair of −12: log(1 + e) in float32 would round 6e-6 to a few bits."""
    inputs = problem(30, 40, 16, scale=0.0, teacher=False, labels=(torch.arange(30), torch.arange(40) + 30))
    sums = by_walk(impl, inputs, biases(-12.0), pairwise(CLIP), upstream=None).sums
    assert sums[0].item() == pytest.approx(1200 * math.log1p(math.exp(-12.0)), rel=1e-6)


@pytest.mark.parametrize("impl", WALKS)
@pytest.mark.parametrize(
    "needs", [(1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 1), (1, 0, 0, 1, 0), (0, 0, 0, 0, 1)]
)
def test_only_what_is_needed(impl, needs):
    inputs, needs = problem(40, 33, 16), PairNeeds(*map(bool, needs))
    everything = by_walk(impl, inputs, biases(), pairwise())
    got = by_walk(impl, inputs, biases(), pairwise(), needs=needs)
    for name, need in needs._asdict().items():
        x = getattr(got, name)
        assert (x is not None) == need
        if need:
            assert error(x, getattr(everything, name)) < SLACK[torch.float32]


@pytest.mark.parametrize("impl", WALKS)
def test_permuting_rows_permutes_gradients(impl):
    inputs = problem(50, 41, 16)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    shuffled = inputs._replace(
        image=inputs.image[order], labels=inputs.labels[order], teacher_image=inputs.teacher_image[order]
    )
    plain, moved = (by_walk(impl, x, biases(), pairwise()) for x in (inputs, shuffled))
    assert error(moved.sums, plain.sums) < 1e-6
    assert error(moved.image, plain.image[order.to(DEVICE)]) < 2e-6
    assert error(moved.text, plain.text) < 2e-6


@pytest.mark.parametrize("impl", WALKS)
def test_repeats_bit_for_bit_and_leaves_inputs_alone(impl):
    inputs = to_device(problem(70, 45, 24))
    before = [None if x is None else x.clone() for x in inputs]
    b = Biases(*(x.float().to(DEVICE) for x in biases()))
    first, second = (WALKS[impl](inputs, b, pairwise(), ALL, UPSTREAM.float().to(DEVICE)) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(a is None or torch.equal(a, c) for a, c in zip(before, inputs, strict=True))


def test_scratch_of_several_strips():
    """The tests' memory is poisoned: a lane of the scratch that is read must have been written."""
    check("triton", problem(70, 45, 24), biases(), pairwise(), strip_bytes=1)
    check("triton", problem(20, 24, 72), biases(), pairwise(), tile=None)


@pytest.mark.parametrize("impl", WALKS)
def test_bad_features_give_nan(impl):
    inputs = problem(20, 35, 16)
    inputs.image[3, 2] = math.nan
    assert by_walk(impl, inputs, biases(), pairwise()).sums[:2].isnan().all()


@pytest.mark.parametrize(
    ("needs", "products"),
    [((1, 1, 1, 1, 1), 3), ((1, 0, 1, 1, 1), 2), ((1, 1, 0, 0, 1), 2), ((1, 0, 0, 0, 0), 1)],
    ids=["both towers", "a locked image tower", "a locked text tower", "no gradient"],
)
def test_products_of_the_blocked_walk(needs, products, monkeypatch):
    """Every product of a walk multiplies all its pairs by D once."""
    work = []

    def counted(function, b_columns):
        def count(*args):
            left, right = args[-2 - b_columns : len(args) - b_columns]
            work.append(len(left) * len(right) * left.shape[1])
            return function(*args)

        return count

    monkeypatch.setattr(_blocked_tile, "product", counted(_blocked_tile.product, 1))
    monkeypatch.setattr(sigmoid_blocked, "add_product", counted(sigmoid_blocked.add_product, 0))
    inputs, b = problem(64, 40, 16, teacher=False), Biases(torch.tensor(-4.0, dtype=torch.float64))
    sigmoid_blocked.walk(inputs, b, pairwise(CLIP), PairNeeds(*map(bool, needs)))
    assert sum(work) == products * 64 * 40 * 16


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 4), st.floats(0, 0.5), st.floats(-15, 5))
def test_any_shape_and_option(N, M, eighths, margin, bias):
    chosen = pairwise(FULL[:2], margin)
    for impl in WALKS:
        check(impl, problem(N, M, 8 * eighths), biases(bias), chosen, slack=5e-6)


def test_the_terms_that_take_a_sigmoid_come_first():
    assert TERMS[:2] == ("contrastive", "relational")
