"""The Triton loss kernels, forward and backward, against the definition in float64.

On a GPU these are the compiled kernels; without one the same kernels under Triton's interpreter.
"""

from __future__ import annotations

import loss_calls
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_calls import (
    CLIP,
    FULL,
    SIZES,
    SMALL,
    by_definition,
    by_kernels,
    check,
    options,
    problem,
    to_device,
)
from three_runs import SLACK, error
from triton_interpreter import DEVICE, HAS_GPU

from tracer.kernels import contrastive_eager, contrastive_triton
from tracer.kernels._grid import plan
from tracer.kernels._tiles import Tile
from tracer.kernels._triton import gpu
from tracer.kernels.contrastive import Inputs, Needs

# numpy, in the interpreter, warns of lanes that a mask throws away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FEATURES = ("image", "text", "teacher_image", "teacher_text")


@pytest.mark.parametrize("stats", [False, True], ids=["plain", "stats"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_full_objective(size, stats):
    check(problem(*size), options(0.3, 0.1, teacher_temperature=1.25, stats=stats))


@pytest.mark.parametrize(
    ("margin", "smoothing", "terms", "labelled", "teacher"),
    [
        (0.0, 0.0, CLIP, False, False),  # CLIP
        (0.3, 0.1, CLIP, True, False),  # MPM-NCE
        (0.3, 0.0, CLIP, False, False),  # each option alone
        (0.0, 0.1, CLIP, True, False),
        (0.0, 0.0, FULL, False, True),  # TRACER as published: no margin, so s is z
        (0.3, 0.0, FULL[:2], True, True),  # s beside z
        (0.3, 0.1, FULL[1:2], True, True),  # each distillation term alone
        (0.0, 0.0, FULL[2:3], True, True),
        (0.0, 0.0, FULL[3:], True, True),
        (0.0, 0.0, FULL[1:], False, True),
    ],
)
def test_options(margin, smoothing, terms, labelled, teacher):
    inputs = problem(37, 37, 24, labels="some" if labelled else None, teacher=teacher)
    check(inputs, options(margin, smoothing, terms))
    check(inputs, options(margin, smoothing, terms, stats=True), tile=Tile(32, 16, 32, 4, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("terms", [CLIP, FULL], ids=["clip", "full"])
def test_low_precision(dtype, terms):
    """Products are exact in float32, so terms are; gradients are rounded, with the strips, to the dtype."""
    check(problem(70, 50, 48, dtype=dtype), options(0.2, 0.1, terms, stats=True), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_costs_the_terms_nothing(dtype):
    """Torch's own products round at these dtypes, so the rule of three runs would allow more than there is."""
    inputs, chosen, weights = problem(70, 50, 48, dtype=dtype), options(0.2, 0.1), torch.ones(4)
    truth = by_definition(inputs, chosen, weights)
    forward, gradients = by_kernels(inputs, chosen, weights, dtype=dtype)
    assert error(forward.terms, truth["terms"]) < 1e-5
    for name, got in gradients._asdict().items():
        assert error(got, truth[name]) < torch.finfo(dtype).eps


def test_half_precision_survives_a_loss_scaler():
    """Upstream gradients of 2^16, and probabilities below half's smallest number times that."""
    inputs = problem(96, 96, 16, dtype=torch.float16, labels=None, teacher=False, scale=4.0)
    weights = torch.tensor([2.0**16, 0, 0, 0], dtype=torch.float64)
    truth = by_definition(inputs, options(terms=CLIP), weights)
    _, gradients = by_kernels(inputs, options(terms=CLIP), weights, dtype=torch.float16)
    for name, got in gradients._asdict().items():
        assert error(got, truth[name]) < 2e-3


@pytest.mark.parametrize("needed", Needs._fields)
@pytest.mark.parametrize("terms", [CLIP, FULL], ids=["clip", "full"])
def test_only_the_needed_gradients(needed, terms):
    inputs, chosen = problem(40, 33, 16), options(0.2, 0.0, terms)
    weights = torch.tensor([0.5, 1.0, 2.0, -1.0], dtype=torch.float64)
    truth = by_definition(inputs, chosen, weights)
    needs = Needs(*(name == needed for name in Needs._fields))
    _, gradients = by_kernels(inputs, chosen, weights, needs=needs)
    for name, got in gradients._asdict().items():
        assert (got is not None) == (name == needed)
    assert error(getattr(gradients, needed), truth[needed]) < SLACK[torch.float32]


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits(scale):
    """Logits of ±1e4 carry errors of 1e-3 in float32; probabilities, and gradients, inherit them."""
    check(problem(40, 36, 16, scale=scale), options(0.3, 0.1, stats=True), slack=1e-5, grad_slack=5e-3)


def test_common_offset():
    """All logits moved by 500: what is left after cancelling is still right."""
    inputs = problem(40, 36, 16, scale=1.0)
    for name in FEATURES:
        getattr(inputs, name)[:, 0] = 22.0
    inputs = Inputs(*(x.float().double() if x is not None and x.is_floating_point() else x for x in inputs))
    check(inputs, options(0.3, 0.1, stats=True), slack=1e-4, grad_slack=1e-2)


@pytest.mark.parametrize(
    "labels",
    [
        (torch.zeros(20, dtype=torch.long), torch.zeros(33, dtype=torch.long)),  # one class: no negatives
        (torch.arange(33)[:20] * 2**40, torch.arange(33) % 20 * 2**40),  # one or two positives a row
        (torch.tensor([-1] * 19 + [7]), torch.tensor([-1] * 32 + [7])),  # negative labels, one lonely pair
    ],
    ids=["one class", "distinct", "negative"],
)
def test_label_patterns(labels):
    check(problem(20, 33, 16, labels=labels), options(0.3, 0.1, stats=True))


def test_duplicated_rows():
    """Ties: the first of equal logits is the argmax, as in the definition. Products are exact here."""
    inputs, generator = problem(48, 48, 16, labels=None), torch.Generator().manual_seed(0)
    for name in FEATURES:
        x = getattr(inputs, name)
        x[:24] = torch.randint(-3, 4, (24, 16), generator=generator) / 8
        x[24:] = x[:24]
    check(inputs, options(stats=True))


def test_ties_across_tiles():
    """The first of equal logits is the argmax when they lie in two tiles of one program, and in two programs."""
    rows = torch.arange(32).sub(27).clamp(min=0)  # copy 0 is the positive of 28 rows, each other of one
    inputs = problem(32, 160, 16, labels=(rows, torch.arange(160) // 32))
    for x in (inputs.image, inputs.teacher_image):
        x[:] = torch.randint(-3, 4, (32, 16), generator=torch.Generator().manual_seed(0)) / 8
    for x in (inputs.text, inputs.teacher_text):  # five copies of 32 texts, a tile each
        x[:] = inputs.image.repeat(5, 1)
    assert plan(32, 160, SMALL, gpu(DEVICE).multiprocessors).rectangle[1] > 1 or HAS_GPU
    check(inputs, options(stats=True))


def test_all_logits_far_below_zero():
    """Logits of -3e4 and less: pairs outside a ragged matrix must still count as lower than any of them."""
    inputs = problem(21, 35, 16, scale=-4e4)
    for name in FEATURES:
        x = getattr(inputs, name)
        x[:] = 0
        x[:, 0] = 1  # every product is 1; float32 holds such logits to about 4e-3
    truth = by_definition(inputs, options(stats=True), torch.ones(4))
    got = contrastive_triton.forward(to_device(inputs), options(stats=True), tile=SMALL)
    assert error(got.terms, truth["terms"]) < 1e-3
    assert error(got.diagnostics, truth["diagnostics"]) < 2e-3


def test_no_scale():
    """At σ = 0 all logits are equal, and σ's gradient is still Σ ∂L/∂s u·v."""
    check(problem(40, 36, 16, scale=0.0), options(0.3, 0.1, stats=True), slack=5e-6)


def test_upstream_gradient_may_be_a_broadcast_number():
    """``terms.sum()`` hands down one number with stride 0."""
    inputs, broadcast = problem(40, 36, 16), torch.ones(1).expand(4)
    assert broadcast.stride() == (0,)
    _, want = by_kernels(inputs, options(0.2, 0.1), torch.ones(4))
    _, got = by_kernels(inputs, options(0.2, 0.1), broadcast)
    assert all(map(torch.equal, got, want))


def test_permuting_rows_permutes_gradients():
    inputs, weights, chosen = problem(50, 41, 16), torch.ones(4), options(0.2, 0.1, stats=True)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    shuffled = inputs._replace(
        image=inputs.image[order], labels=inputs.labels[order], teacher_image=inputs.teacher_image[order]
    )
    forward, gradients = by_kernels(inputs, chosen, weights)
    shuffled_forward, shuffled_gradients = by_kernels(shuffled, chosen, weights)
    assert error(shuffled_forward.terms, forward.terms) < 1e-6
    assert error(shuffled_forward.diagnostics, forward.diagnostics) < 1e-6
    assert error(shuffled_gradients.image, gradients.image[order.to(DEVICE)]) < 2e-6
    assert error(shuffled_gradients.text, gradients.text) < 2e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("operand", FEATURES)
def test_bad_features_give_nan(bad, operand):
    """Never a hang, never a finite number: each enabled term that sees the feature is NaN."""
    inputs = problem(20, 35, 16)
    getattr(inputs, operand)[3, 2] = bad
    want = contrastive_eager.contrastive_terms(inputs, options(0.2, 0.1))[0]
    got = contrastive_triton.forward(to_device(inputs), options(0.2, 0.1), tile=SMALL).terms
    assert want.isnan().any()
    assert torch.equal(got.cpu().isnan(), want.isnan()), (got, want)


def test_row_without_positive_gives_nan():
    inputs = problem(6, 6, 8, labels=(torch.tensor([0, 1, 2, 3, 4, 99]), torch.tensor([0, 1, 2, 3, 4, 4])))
    forward, gradients = by_kernels(inputs, options(), torch.ones(4))
    assert forward.terms.isnan().tolist() == [True, False, True, False]
    assert all(gradient.isnan().any() for gradient in gradients)


def test_repeats_bit_for_bit_and_leaves_inputs_alone():
    inputs, chosen = problem(70, 45, 24), options(0.2, 0.1, stats=True)
    moved = to_device(inputs)
    before = [None if x is None else x.clone() for x in moved]
    weights = torch.tensor([1.0, 0.5, 2.0, 3.0], device=DEVICE)

    def run():
        forward = contrastive_triton.forward(moved, chosen, tile=SMALL)
        gradients = contrastive_triton.backward(weights, moved, forward.saved, chosen, Needs(), tile=SMALL)
        return *forward, *gradients

    assert all(map(torch.equal, run(), run()))
    assert all(a is None or torch.equal(a, b) for a, b in zip(before, moved, strict=True))


def test_scratch_of_several_strips():
    """The tests' memory is poisoned: a lane of the scratch that is read must have been written."""
    check(problem(70, 45, 24), options(0.2, 0.1, stats=True), strip_bytes=1)


def test_inputs_need_not_be_contiguous():
    inputs = problem(33, 40, 16)
    strided = inputs._replace(
        image=inputs.image.T.contiguous().T,
        text=torch.stack([inputs.text, inputs.text], 1)[:, 1],
        labels=inputs.labels.repeat_interleave(2)[::2],
        teacher_text=inputs.teacher_text.T.contiguous().T,
    )
    check(strided, options(0.2, 0.1, stats=True))


def test_strip_size_does_not_matter():
    """Strips of one row of tiles, of a few, and one strip for everything."""
    inputs, weights, chosen = problem(70, 45, 24), torch.ones(4), options(0.2, 0.1)
    _, want = by_kernels(inputs, chosen, weights)
    for strip_bytes in (1, 3 * 48 * 4 * 40):
        _, got = by_kernels(inputs, chosen, weights, strip_bytes=strip_bytes)
        assert all(error(g, w) < 1e-6 for g, w in zip(got, want, strict=True))


def test_zero_upstream_gradient():
    _, gradients = by_kernels(problem(20, 20, 8), options(0.2, 0.1), torch.zeros(4))
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("D", [8, 72, 1280])
def test_widths(D):
    """Narrower than a block; no multiple of a block; the widest model, through the table's own tiles."""
    check(problem(20, 24, D), options(0.2, 0.1, stats=True), tile=None)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.integers(1, 5),
    st.floats(0, 0.5),
    st.floats(0, 0.9),
    st.integers(0, 99),
)
def test_any_shape_and_option(N, M, eighths, margin, smoothing, seed):
    check(problem(N, M, 8 * eighths, seed=seed), options(margin, smoothing, stats=True), slack=5e-6)


if HAS_GPU:

    def test_launches_on_the_tensors_own_device():
        device = torch.device("cuda", torch.cuda.device_count() - 1)
        inputs = Inputs(*(x.to(device) for x in to_device(problem(64, 64, 64))))
        assert contrastive_triton.forward(inputs, options(0.1, 0.1)).terms.device == device


def test_through_the_dispatcher():
    """The public call with autograd, at the table's own tiles: a weighted loss, times two, and the diagnostics."""
    kwargs = loss_calls.problem(40, 33, dtype=torch.float32) | loss_calls.OPTIONS["all"]
    output, truth = loss_calls.assert_right("triton", kwargs | {"stats": True}, upstream=2.0)
    for name, value in truth.stats.items():
        assert error(output.stats[name], value) < 1e-5, name
