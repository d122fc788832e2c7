"""The forms of the contrastive term through the public call: sigmoid, directions, labels without a partner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_calls import (
    ALL_IMPLS,
    DEVICE,
    OPTIONS,
    WEIGHTS,
    assert_right,
    in_float64,
    inputs_of,
    loss_and_gradients,
    problem,
    small_tiles,  # noqa: F401
    without_teacher,
)
from three_runs import error

from tracer.kernels import contrastive_blocked, contrastive_triton
from tracer.kernels.contrastive import Biases, Needs, Options
from tracer.kernels.sigmoid import PairNeeds
from tracer.ops import contrastive_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("small_tiles"),
]
TILED = pytest.mark.parametrize("impl", ["blocked", "triton"])
EVERY = pytest.mark.parametrize("impl", ALL_IMPLS)


def dtype_of(impl: str) -> torch.dtype:
    return torch.float32 if impl == "triton" else torch.float64


def sigmoid(
    n: int = 33, m: int = 45, impl: str = "blocked", bias: float = -4.0, **others: Any
) -> dict[str, Any]:
    """Return a call with a sigmoid, all other terms and a bias that asks for its gradient."""
    kwargs = problem(n, m, dtype=dtype_of(impl)) | WEIGHTS | {"margin": 0.1, "contrast": "sigmoid"}
    given = {"logit_bias": torch.tensor(bias, dtype=kwargs["logit_scale"].dtype, device=DEVICE), **others}
    return kwargs | {"teacher_logit_bias": -3.0} | given


def gradients(impl: str, kwargs: dict[str, Any], upstream: float = 1.0) -> dict[str, torch.Tensor]:
    """Return the loss and the gradients of everything that has one."""
    names = [name for name in (*Needs._fields, "logit_bias") if name in kwargs]
    leaves = {name: kwargs[name].clone().requires_grad_() for name in names}
    loss = contrastive_loss(**(kwargs | leaves), impl=impl).loss
    got = torch.autograd.grad(upstream * loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(names, got, strict=True))}


def assert_as_defined(impl: str, kwargs: dict[str, Any], **how: Any) -> None:
    truth = gradients("eager", in_float64(kwargs), **how)
    allowed = 1e-12 if dtype_of(impl) == torch.float64 else 2e-5
    for name, got in gradients(impl, kwargs, **how).items():
        assert error(got, truth[name]) < allowed, name


# ---------------------------------------------------------------------------------------------------
# Sigmoid


@TILED
def test_sigmoid_with_all_terms(impl):
    assert_as_defined(impl, sigmoid(impl=impl), upstream=3.0)
    assert_as_defined(impl, sigmoid(24, 24, impl) | {"relational": 0.0, "cross": 0.0})


@TILED
def test_a_bias_may_be_a_number_or_a_tensor_or_left_out(impl):
    """A number is as good as a tensor, and no bias is a bias of 0."""
    kwargs = sigmoid(impl=impl)
    loss = contrastive_loss(**kwargs, impl=impl).loss
    assert contrastive_loss(**(kwargs | {"logit_bias": -4.0}), impl=impl).loss == loss
    zero = contrastive_loss(**(kwargs | {"logit_bias": 0.0}), impl=impl).loss
    assert contrastive_loss(**(kwargs | {"logit_bias": None}), impl=impl).loss == zero
    one_element = kwargs["logit_bias"].reshape(1).requires_grad_()
    contrastive_loss(**(kwargs | {"logit_bias": one_element}), impl=impl).loss.backward()
    assert one_element.grad.shape == (1,)


@EVERY
def test_the_teachers_bias_is_the_students_if_left_out(impl):
    kwargs = sigmoid(impl=impl)
    same = contrastive_loss(**(kwargs | {"teacher_logit_bias": -4.0}), impl=impl).terms["relational"]
    assert contrastive_loss(**(kwargs | {"teacher_logit_bias": None}), impl=impl).terms["relational"] == same
    bias = kwargs["logit_bias"].clone().requires_grad_()
    term = contrastive_loss(**(kwargs | {"logit_bias": bias, "teacher_logit_bias": bias}), impl=impl)
    fixed = contrastive_loss(**(kwargs | {"logit_bias": bias, "teacher_logit_bias": -4.0}), impl=impl)
    of_both, of_one = (torch.autograd.grad(x.terms["relational"], bias)[0] for x in (term, fixed))
    assert of_both == of_one


@TILED
@pytest.mark.parametrize(
    "needs", [("image",), ("text",), ("logit_bias",), ("logit_scale", "logit_bias"), ("image", "logit_scale")]
)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "all terms"])
def test_any_subset_of_gradients(impl, needs, alone):
    kwargs = sigmoid(13, 17, impl)
    kwargs |= dict.fromkeys(WEIGHTS, 0.0) if alone else {}
    expected = gradients(impl, kwargs)
    leaves = {name: kwargs[name].clone().requires_grad_() for name in needs}
    loss = contrastive_loss(**(kwargs | leaves), impl=impl).loss
    for name, got in zip(needs, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(got, expected[name], rtol=1e-5, atol=1e-6)


@TILED
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "all terms"])
def test_a_second_backward_and_any_upstream_gradient(impl, alone):
    """Gradients made in the forward pass are those of a backward pass: repeated, scaled, of a single term."""
    kwargs = sigmoid(13, 17, impl) | (dict.fromkeys(WEIGHTS, 0.0) if alone else {})
    image = kwargs["image"].clone().requires_grad_()
    output = contrastive_loss(**(kwargs | {"image": image}), impl=impl)
    first, second = (torch.autograd.grad(output.loss, image, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (scaled,) = torch.autograd.grad(-2.5 * output.loss, image, retain_graph=True)
    torch.testing.assert_close(scaled, -2.5 * first)
    (term,) = torch.autograd.grad(output.terms["contrastive"], image)
    exact = in_float64(kwargs)["image"].requires_grad_()
    truth = contrastive_loss(**(in_float64(kwargs) | {"image": exact}), impl="eager").terms["contrastive"]
    assert error(term, torch.autograd.grad(truth, exact)[0]) < 1e-5


@TILED
def test_double_backward_is_refused_by_name(impl):
    kwargs = without_teacher(sigmoid(9, 9, impl)) | dict.fromkeys(WEIGHTS, 0.0)
    image = kwargs["image"].requires_grad_()
    (gradient,) = torch.autograd.grad(contrastive_loss(**kwargs, impl=impl).loss, image, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"double backward.*impl='eager'"):
        gradient.sum().backward()


def test_sigmoid_alone_saves_gradients_and_nothing_else():
    """Bytes that autograd keeps: a gradient for each feature, no statistics, no features, no matrix."""
    for n in (64, 128, 256):
        kwargs = without_teacher(problem(n, n, d=32, classes=0, dtype=torch.float32)) | {
            "contrast": "sigmoid"
        }
        leaves = {name: kwargs[name].clone().requires_grad_() for name in Needs._fields}
        kept: dict[int, int] = {}

        def pack(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            contrastive_loss(**(kwargs | leaves), impl="auto")
        assert sum(kept.values()) <= 2 * n * 4 * 32 + 64


def test_no_gradient_asked_for_is_none_computed():
    kwargs = sigmoid(9, 9)
    with torch.no_grad():
        loss = contrastive_loss(**(kwargs | {"image": kwargs["image"].requires_grad_()}), impl="blocked").loss
    assert loss.grad_fn is None


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "all terms"])
def test_compiles_without_graph_breaks(alone):
    torch._dynamo.reset()
    impl = "blocked"
    kwargs = sigmoid(16, 24, impl) | (dict.fromkeys(WEIGHTS, 0.0) if alone else {})
    names = (*Needs._fields, "logit_bias")

    def loss(*leaves):
        return contrastive_loss(**(kwargs | dict(zip(names, leaves, strict=True))), impl=impl).loss

    leaves = [kwargs[name].clone().requires_grad_() for name in names]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


@TILED
@pytest.mark.parametrize("needs", [PairNeeds(*[True] * 5), PairNeeds(text=True)], ids=["all", "some"])
def test_the_operator_passes_torchs_own_checks(impl, needs):
    inputs = inputs_of(problem(9, 9, dtype=torch.float32))
    biases = Biases(torch.tensor(-3.0, device=DEVICE), torch.tensor(-2.0, device=DEVICE))
    options = Options(0.1, relational=True, sigmoid=True)
    arguments = (impl, torch.ones(4, device=DEVICE), *inputs, *biases, *options, *needs)
    torch.library.opcheck(torch.ops.tracer.sigmoid_pairs, arguments)


@pytest.mark.parametrize("impl", ["eager", "blocked"])
def test_autocast(impl):
    kwargs = sigmoid(33, 33) | {"feature": 0.0}
    single = {
        name: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in kwargs.items()
    }
    truth = gradients("eager", kwargs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = gradients(impl, single)
    for name, x in got.items():
        assert x.dtype == torch.float32, name
        assert error(x, truth[name]) < 3e-2, name


@EVERY
def test_sigmoid_diagnostics_are_the_softmaxs(impl):
    kwargs = sigmoid(impl=impl) | {"stats": True}
    softmax = {
        name: x for name, x in kwargs.items() if name not in ("contrast", "logit_bias", "teacher_logit_bias")
    }
    expected = contrastive_loss(**softmax, impl=impl).stats
    for name, value in contrastive_loss(**kwargs, impl=impl).stats.items():
        torch.testing.assert_close(value, expected[name])


# ---------------------------------------------------------------------------------------------------
# Directions


@EVERY
@pytest.mark.parametrize("directions", [(1, 0), (0, 1), (0.3, 0.9)], ids=str)
@pytest.mark.parametrize("name", ["clip", "mpm-nce", "all"])
def test_directions(impl, directions, name):
    kwargs = problem(33, 45, dtype=dtype_of(impl)) | OPTIONS[name] | {"directions": directions}
    assert_right(impl, kwargs, slack=2e-5 if impl == "triton" else 1e-12, upstream=2.0)


@pytest.mark.parametrize("impl", ["eager", "blocked"])
def test_directions_are_the_halves_of_the_loss(impl):
    kwargs = problem(33, 45) | OPTIONS["all"] | {"feature": 0.0}
    rows, cols, both = (
        contrastive_loss(**kwargs, directions=d, impl=impl).loss for d in ((1, 0), (0, 1), (0.5, 0.5))
    )
    torch.testing.assert_close(0.5 * (rows + cols), both)
    torch.testing.assert_close(
        contrastive_loss(**kwargs, directions=(2, 3), impl=impl).loss, 2 * rows + 3 * cols
    )


@EVERY
def test_one_direction_asks_nothing_of_the_other_side(impl):
    """A column without a positive has no part in the rows' softmaxes' targets."""
    kwargs = without_teacher(problem(13, 17, dtype=dtype_of(impl)))
    kwargs["text_labels"][4] = 99
    assert contrastive_loss(**kwargs, impl=impl).loss.isnan()
    assert contrastive_loss(**kwargs, directions=(0, 1), impl=impl).loss.isnan()
    assert_right(impl, kwargs | {"directions": (1, 0)}, slack=1e-5)
    assert_right(impl, kwargs | {"directions": (1, 0), "stats": True}, slack=1e-5)
    back = kwargs | {"labels": kwargs["text_labels"], "text_labels": kwargs["labels"]}
    back |= {"image": kwargs["text"], "text": kwargs["image"]}
    assert_right(impl, back | {"directions": (0, 1), "stats": True}, slack=1e-5)


@TILED
@pytest.mark.parametrize("terms", [{"stats": True}, {"cross": 0.7}, {"cross": 0.7, "stats": True}], ids=str)
def test_a_sigmoid_needs_no_positive(impl, terms):
    """Nor do the diagnostics and the cross term, which take softmaxes: nothing of 0/0 reaches the gradients."""
    kwargs = sigmoid(13, 17, impl) | {"interactive": 0.0, "relational": 0.0, "cross": 0.0} | terms
    kwargs["labels"][3], kwargs["text_labels"][4] = 98, 99
    assert contrastive_loss(**kwargs, impl=impl).loss.isfinite()
    assert_as_defined(impl, kwargs)


@TILED
def test_one_direction_keeps_no_statistics_of_the_other(impl):
    kwargs = problem(13, 17, dtype=torch.float32)
    options = Options(relational=True, cross=True, image_to_text=1.0, text_to_image=0.0)
    module = {"blocked": contrastive_blocked, "triton": contrastive_triton}[impl]
    result = module.forward(inputs_of(kwargs), options)
    assert result.row_stats.shape == (5, 13)
    assert result.col_stats.shape == (0, 17)
    assert module.statistics(inputs_of(kwargs), options)[1] == {}


@TILED
@pytest.mark.parametrize("directions", [(1, 0), (0.3, 0.9)], ids=str)
def test_diagnostics_are_of_both_directions_always(impl, directions):
    kwargs = problem(33, 45, dtype=torch.float32) | WEIGHTS | {"stats": True}
    expected = contrastive_loss(**kwargs, impl=impl).stats
    for name, value in contrastive_loss(**kwargs, directions=directions, impl=impl).stats.items():
        torch.testing.assert_close(value, expected[name])


@TILED
def test_wild_logits_in_one_direction(impl):
    """Where one constant cannot be subtracted before the exponentials."""
    kwargs = problem(24, 30, scale=1e4, dtype=dtype_of(impl)) | WEIGHTS | {"directions": (0, 1)}
    assert_right(impl, kwargs, slack=5e-3 if impl == "triton" else 1e-10)


def test_left_out_rows_in_one_direction_compile():
    torch._dynamo.reset()
    kwargs = hard_negatives("triton", **OPTIONS["all"]) | {"directions": (0, 1)}
    leaves = [kwargs[name].clone().requires_grad_() for name in Needs._fields]

    def loss(*leaves):
        return contrastive_loss(
            **(kwargs | dict(zip(Needs._fields, leaves, strict=True))), impl="blocked"
        ).loss

    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


@TILED
def test_one_direction_passes_torchs_checks(impl):
    options = Options(0.1, 0.1, relational=True, ignore=True, image_to_text=1.0, text_to_image=0.0)
    inputs = inputs_of(problem(9, 9, dtype=torch.float32))
    torch.library.opcheck(torch.ops.tracer.contrastive_loss, (impl, *inputs, *options))
    torch.library.opcheck(torch.ops.tracer.contrastive_statistics, (impl, *inputs, *options))


# ---------------------------------------------------------------------------------------------------
# Labels without a partner


def hard_negatives(impl: str, n: int = 30, m: int = 44, **others: Any) -> dict[str, Any]:
    """Return a call in which rows and columns have no partner: some by their label, one by its loneliness."""
    kwargs = problem(n, m, dtype=dtype_of(impl)) | {"ignore_index": -1} | others
    kwargs["labels"][3:6], kwargs["text_labels"][7:12], kwargs["text_labels"][20] = -1, -1, 88
    return kwargs


@EVERY
@pytest.mark.parametrize("name", ["clip", "mpm-nce", "all"])
@pytest.mark.parametrize("directions", [(0.5, 0.5), (1, 0)], ids=str)
def test_left_out_rows_and_columns(impl, name, directions):
    kwargs = hard_negatives(impl, **OPTIONS[name]) | {"directions": directions}
    ours, _ = assert_right(impl, kwargs, slack=2e-5 if impl == "triton" else 1e-12, upstream=2.0)
    assert ours.loss.isfinite()


@TILED
def test_left_out_rows_under_a_sigmoid(impl):
    assert_as_defined(
        impl,
        hard_negatives(impl, **WEIGHTS)
        | {"contrast": "sigmoid", "logit_bias": torch.tensor(-3.0, dtype=dtype_of(impl), device=DEVICE)},
    )


def test_hard_negatives_by_hand():
    """The rows' softmaxes see all texts; the means run over labelled images, and over labelled texts."""
    kwargs = without_teacher(problem(6, 9, classes=0))
    labels, text_labels = torch.tensor([0, 1, 2, 3, -1, -1]), torch.tensor([0, 1, 2, 3, -1, -1, -1, -1, -1])
    kwargs |= {"labels": labels, "text_labels": text_labels}
    z = kwargs["logit_scale"] * kwargs["image"] @ kwargs["text"].T
    rows, cols = z.log_softmax(1).diagonal()[:4].mean(), z.log_softmax(0).diagonal()[:4].mean()
    got = contrastive_loss(**kwargs, ignore_index=-1, impl="eager").loss
    assert got.item() == pytest.approx(-0.5 * (rows + cols).item(), rel=1e-12)
    together = contrastive_loss(
        **kwargs, impl="eager"
    ).loss  # without the option −1 is a class like any other
    assert together.item() != pytest.approx(got.item())
    pair = kwargs | {"contrast": "sigmoid", "logit_bias": -2.0, "ignore_index": -1}
    x = z - 2.0
    sums = torch.nn.functional.softplus(x).sum() - x.diagonal()[:4].sum()
    assert contrastive_loss(**pair, impl="eager").loss.item() == pytest.approx(sums.item() / 4, rel=1e-12)


@TILED
@pytest.mark.parametrize("teacher", [False, True])
def test_diagnostics_leave_out_what_has_no_partner(impl, teacher):
    kwargs = hard_negatives(impl) | {"stats": True}
    kwargs = kwargs if teacher else without_teacher(kwargs)
    expected = contrastive_loss(**in_float64(kwargs), impl="eager").stats
    for name, value in contrastive_loss(**kwargs, impl=impl).stats.items():
        assert error(value, expected[name]) < 2e-5, name


@TILED
def test_left_out_rows_get_no_gradient_from_their_own_softmax(impl):
    """Only through the others' softmaxes: in one direction a left-out image gets none at all."""
    kwargs = without_teacher(hard_negatives(impl)) | {"directions": (1, 0), "smoothing": 0.1}
    got = gradients(impl, kwargs)
    assert not got["image"][3:6].any()
    assert got["text"][7:12].any(dim=1).all()


@TILED
def test_wild_logits_with_rows_left_out(impl):
    kwargs = hard_negatives(impl, **WEIGHTS) | {
        "logit_scale": torch.tensor(1e4, dtype=dtype_of(impl), device=DEVICE)
    }
    assert_right(impl, kwargs, slack=5e-3 if impl == "triton" else 1e-10)


@EVERY
def test_nothing_has_a_partner(impl):
    kwargs = without_teacher(problem(8, 8, dtype=dtype_of(impl))) | {"ignore_index": -1}
    kwargs["text_labels"] = kwargs["labels"] + 50
    assert contrastive_loss(**kwargs, impl=impl).loss.isnan()
    got = gradients(impl, kwargs | {"contrast": "sigmoid"})
    assert all(value.isnan().all() for value in got.values())


def test_two_runs_agree_bit_for_bit():
    for kwargs in (sigmoid(70, 90), hard_negatives("triton", 70, 90, **OPTIONS["all"])):
        first, second = (loss_and_gradients("blocked", kwargs) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
