"""``tracer.ops.contrastive_loss``: what holds for every implementation, and which of them ``auto`` takes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_calls import (
    ALL_IMPLS,
    DEVICE,
    OPTIONS,
    WEIGHTS,
    assert_right,
    in_float64,
    loss_and_gradients,
    problem,
    small_tiles,  # noqa: F401
    without_teacher,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from tracer import _checks
from tracer.kernels import contrastive_blocked
from tracer.kernels.contrastive import TERMS, Options
from tracer.ops import contrastive_loss

# numpy, in the interpreter, warns of lanes that a mask throws away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("options", [OPTIONS["clip"], OPTIONS["all"]], ids=["clip", "all"])
@pytest.mark.parametrize(("n", "m", "classes"), [(33, 45, 5), (24, 24, 0)])
def test_triton_through_the_same_call(n, m, classes, options):
    assert_right("triton", problem(n, m, 16, classes, dtype=torch.float32) | options, upstream=3.0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("impl", ["blocked", "triton"])
def test_nothing_outside_the_matrix_counts(impl):
    """Every logit near -20000 and ragged tiles: whatever fills their edges must lie lower still."""
    kwargs = without_teacher(problem(13, 17, dtype=torch.float32, scale=2e4))
    offset = torch.eye(16, device=DEVICE)[0]
    kwargs["image"] = F.normalize(offset + 1e-3 * kwargs["image"], dim=1)
    kwargs["text"] = -F.normalize(offset + 1e-3 * kwargs["text"], dim=1)
    assert contrastive_loss(**kwargs, impl=impl).loss.item() == pytest.approx(
        contrastive_loss(**in_float64(kwargs), impl="eager").loss.item(), rel=5e-3
    )


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_no_gradient_reaches_the_teacher(impl):
    kwargs = problem(9, 11, dtype=torch.float32) | OPTIONS["all"]
    image = kwargs["image"].clone().requires_grad_()
    teacher = {name: kwargs[name].clone().requires_grad_() for name in ("teacher_image", "teacher_text")}
    teacher["teacher_logit_scale"] = torch.tensor(20.0, device=DEVICE, requires_grad=True)
    output = contrastive_loss(**(kwargs | teacher | {"image": image}), impl=impl)
    for value in (output.loss, *output.terms.values()):
        gradients = torch.autograd.grad(
            value, [image, *teacher.values()], allow_unused=True, retain_graph=True
        )
        assert gradients[0] is not None
        assert gradients[1:] == (None, None, None)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_scale_zero(impl):
    """All logits equal: the scale still has a gradient, Σ ∂L/∂s u·v."""
    assert_right(impl, problem(13, 17, scale=0.0, dtype=torch.float32) | OPTIONS["all"], slack=1e-5)


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("term", [*TERMS, "feature"])
def test_gradient_of_a_single_term(impl, term):
    """Terms can be differentiated one by one, whatever their weights."""
    kwargs = problem(13, 17, dtype=torch.float32) | OPTIONS["all"]
    assert_right(impl, kwargs, slack=2e-5, term=term, upstream=-2.0)


def test_gradient_of_a_term_that_is_off_is_zero():
    output, gradients = loss_and_gradients("blocked", problem(9, 9), term="relational")
    assert output.terms["relational"] == 0
    assert all(gradient is None or not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("impl", ["blocked", "triton"])
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 0)])
def test_any_subset_of_gradients(impl, needs):
    kwargs = problem(13, 17, dtype=torch.float32) | OPTIONS["all"]
    _, expected = loss_and_gradients(impl, kwargs)
    names = [name for name, need in zip(("image", "text", "logit_scale"), needs, strict=True) if need]
    leaves = {name: kwargs[name].clone().requires_grad_() for name in names}
    got = iter(torch.autograd.grad(contrastive_loss(**(kwargs | leaves), impl=impl).loss, leaves.values()))
    for need, wanted in zip(needs, expected, strict=True):
        if need:
            torch.testing.assert_close(next(got), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["blocked", "triton"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["image", "text", "teacher_image"])
def test_bad_features_give_nan(impl, bad, where):
    kwargs = problem(13, 13, dtype=torch.float32) | WEIGHTS
    kwargs[where][4, 2] = bad
    assert contrastive_loss(**kwargs, impl=impl).loss.isnan()


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_row_without_positive_gives_nan(impl):
    kwargs = without_teacher(problem(13, 13, dtype=torch.float32))
    kwargs["labels"][4] = 99
    output, gradients = loss_and_gradients(impl, kwargs)
    assert output.loss.isnan()
    assert gradients[0][4].isnan().all()


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_inputs_are_never_written_and_may_have_strides(impl):
    kwargs = problem(13, 17, dtype=torch.float32) | OPTIONS["all"]
    plain = contrastive_loss(**kwargs, impl=impl).loss
    strided = {
        name: torch.stack([x, x], -1)[..., 0] if isinstance(x, torch.Tensor) and x.ndim else x
        for name, x in kwargs.items()
    }
    strided["text"] = kwargs["text"].T.contiguous().T
    copies = {name: x.clone() for name, x in strided.items() if isinstance(x, torch.Tensor)}
    output, _ = loss_and_gradients(impl, strided)
    assert output.loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for name, copy in copies.items():
        assert torch.equal(strided[name], copy), name


@pytest.mark.parametrize("scale", [20.0, torch.tensor(20.0), torch.tensor([20.0])])
@pytest.mark.parametrize("impl", ["eager", "blocked"])
def test_kinds_of_logit_scale(impl, scale):
    kwargs = without_teacher(problem(9, 9, dtype=torch.float32))
    expected = contrastive_loss(**kwargs, impl="eager").loss
    if isinstance(scale, torch.Tensor):
        scale = scale.to(DEVICE).requires_grad_()
    loss = contrastive_loss(**(kwargs | {"logit_scale": scale}), impl=impl).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    if isinstance(scale, torch.Tensor):
        loss.backward()
        assert scale.grad.shape == scale.shape


def test_teacher_scale_defaults_to_the_students():
    kwargs = problem(9, 9)
    kwargs["teacher_logit_scale"] = kwargs["logit_scale"]
    expected = contrastive_loss(**kwargs, relational=1.0).loss
    assert contrastive_loss(**(kwargs | {"teacher_logit_scale": None}), relational=1.0).loss == expected


def test_two_runs_agree_bit_for_bit():
    """On a GPU the tiled walk's index_add_ adds in any order; its kernels do not."""
    impl = "triton" if DEVICE == "cuda" else "blocked"
    kwargs = problem(70, 90, dtype=torch.float32) | OPTIONS["all"]
    first, second = (loss_and_gradients(impl, kwargs) for _ in range(2))
    assert first[0].loss == second[0].loss
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.data())
@pytest.mark.parametrize("impl", ["eager", "blocked"])
def test_order_of_rows_does_not_matter(impl, data):
    n, m = data.draw(st.integers(2, 12)), data.draw(st.integers(2, 12))
    kwargs = problem(n, m, d=8, classes=data.draw(st.integers(1, 4)), seed=data.draw(st.integers(0, 99)))
    kwargs |= {**WEIGHTS, "margin": data.draw(st.sampled_from([0.0, 0.1])), "smoothing": 0.1}
    rows = torch.tensor(data.draw(st.permutations(range(n))))
    cols = torch.tensor(data.draw(st.permutations(range(m))))
    shuffled = dict(kwargs)
    for name in ("image", "teacher_image", "labels"):
        shuffled[name] = kwargs[name][rows]
    for name in ("text", "teacher_text", "text_labels"):
        shuffled[name] = kwargs[name][cols]
    assert contrastive_loss(**shuffled, impl=impl).loss.item() == pytest.approx(
        contrastive_loss(**kwargs, impl=impl).loss.item(), rel=1e-10
    )


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 9), seed=st.integers(0, 99), copies=st.integers(2, 3))
@pytest.mark.parametrize("impl", ["eager", "blocked"])
def test_duplicated_rows_change_no_mean(impl, n, seed, copies):
    """Copying every image and text adds log(copies) to each log-sum-exp and changes no mean over positives."""
    kwargs = without_teacher(problem(n, n, d=8, classes=3, seed=seed))
    once = contrastive_loss(**kwargs, impl=impl).loss
    kwargs = {name: x.repeat_interleave(copies, 0) if x.ndim else x for name, x in kwargs.items()}
    copied = contrastive_loss(**kwargs, impl=impl).loss
    assert copied.item() == pytest.approx(once.item() + math.log(copies), rel=1e-10)


def test_auto_on_a_gpu_takes_the_kernels_for_the_widths_they_can_take():
    """Seen through tensors that only pretend to be on a GPU, so that it is checked without one."""
    with FakeTensorMode():
        for width, impl in ((16, "triton"), (12, "blocked")):
            x = torch.empty(1000, width, device="cuda")
            assert _checks.resolve("auto", x, x, Options()) == impl


@pytest.mark.parametrize(
    ("n", "tiled", "options"),
    [
        (768, False, {}),
        (769, True, {}),
        (512, False, {"relational": 1.0}),
        (513, True, {"relational": 1.0}),
        (513, True, {"stats": True}),
    ],
)
def test_auto_tiles_only_what_is_large(monkeypatch, n, tiled, options):
    """On a CPU; a batch whose matrices fit a cache goes to the definition, which is as fast there."""
    calls, forward = [], contrastive_blocked.forward

    def counted(*args):
        calls.append(args)
        return forward(*args)

    monkeypatch.setattr(contrastive_blocked, "forward", counted)
    x = F.normalize(torch.randn(n, 8, dtype=torch.float64), dim=1)
    teacher = {"teacher_image": x, "teacher_text": x} if "relational" in options else {}
    assert contrastive_loss(x, x, 5.0, **teacher, **options).loss.isfinite()
    assert bool(calls) == tiled


@pytest.mark.parametrize(("most", "impl"), [(2**17, "blocked"), (768**2, "eager")])
def test_auto_goes_by_the_library_that_multiplies_float32(monkeypatch, most, impl):
    monkeypatch.setattr(_checks, "_SMALL_FLOAT32", most)
    x, small = torch.empty(500, 8), torch.empty(360, 8)
    assert _checks.resolve("auto", x, x, Options()) == impl
    assert _checks.resolve("auto", small, small, Options()) == "eager"
    assert _checks.resolve("auto", x.bfloat16(), x.bfloat16(), Options()) == "eager"
