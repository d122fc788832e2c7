"""The loss inside torch: custom operators, torch.compile, autocast, no_grad, what is saved, what is refused."""

from __future__ import annotations

import pytest
import torch
from loss_calls import (
    DEVICE,
    OPTIONS,
    WEIGHTS,
    in_float64,
    inputs_of,
    loss_and_gradients,
    problem,
    results,
    without_teacher,
)
from three_runs import SLACK, assert_no_worse
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from tracer.kernels.contrastive import Forward, Needs, Options
from tracer.ops import contrastive_loss

# numpy, in the interpreter, warns of lanes that a mask throws away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("impl", ["blocked", "triton"])
def test_compiles_without_graph_breaks(impl):
    kwargs = problem(16, 24, dtype=torch.float32) | OPTIONS["all"]

    def loss(image, text, logit_scale):
        return contrastive_loss(
            **(kwargs | {"image": image, "text": text, "logit_scale": logit_scale}), impl=impl
        ).loss

    leaves = [kwargs[name].clone().requires_grad_() for name in ("image", "text", "logit_scale")]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", ["blocked", "triton"])
@pytest.mark.parametrize(
    ("dtype", "labelled", "has_teacher"),
    [
        (torch.float32, True, True),
        (torch.float32, False, False),  # every optional tensor is None
        (torch.bfloat16, True, True),
    ],
    ids=["labels and teacher", "nothing optional", "bfloat16"],
)
def test_operators_pass_torchs_own_checks(impl, dtype, labelled, has_teacher):
    """Schema, fake kernel and autograd registration, of backward too: what torch.compile relies on."""
    kwargs = problem(9, 9, classes=3 if labelled else 0, dtype=dtype)
    inputs = inputs_of(kwargs if has_teacher else without_teacher(kwargs))
    options = Options(0.1, 0.1, 1.5, True, *[has_teacher] * 3)
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in Needs._fields}
    torch.library.opcheck(
        torch.ops.tracer.contrastive_loss, (impl, *inputs._replace(**leaves), *options._replace(stats=True))
    )
    result = Forward(*torch.ops.tracer.contrastive_loss(impl, *inputs, *options))
    whole = (len(inputs.image), len(inputs.text))
    for needs in (Needs(), Needs(image=False, logit_scale=False)):
        torch.library.opcheck(
            torch.ops.tracer.contrastive_loss_backward,
            (
                impl,
                torch.ones_like(result.terms),
                *inputs,
                *result.saved,
                *options,
                *needs,
                *whole,
            ),
        )
    torch.library.opcheck(torch.ops.tracer.contrastive_statistics, (impl, *inputs, *options))


def called(call, name: str) -> bool:
    """Return whether ``call`` calls one of the custom operators."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return any(event.key.startswith(f"tracer::{name}") for event in profile.key_averages())


@pytest.mark.parametrize("impl", ["blocked", "triton"])
@pytest.mark.parametrize("contrast", ["softmax", "sigmoid"])
def test_an_eager_call_takes_no_custom_operator_and_equals_one_bit_for_bit(impl, contrast):
    """A call on the host is several times as short without them; what traces still sees one."""
    kwargs = problem(9, 9, dtype=torch.float32) | {"contrast": contrast, "feature": 0.0}
    kwargs |= {"relational": 0.5, "impl": impl}
    names = ("image", "text", "logit_scale")

    def call(kwargs):
        leaves = {name: kwargs[name].clone().requires_grad_() for name in names}
        output = contrastive_loss(**(kwargs | leaves))
        return output.terms, torch.autograd.grad(output.loss, list(leaves.values()))

    operator = "sigmoid_pairs" if contrast == "sigmoid" else "contrastive_loss"
    results = []
    assert not called(lambda: results.append(call(kwargs)), operator)
    with FlopCounterMode(display=False):  # as in any mode that looks at what torch does
        assert called(lambda: results.append(call(kwargs)), operator)
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["blocked", "triton"])
def test_upstream_gradient_may_have_any_strides(impl):
    """The gradient of a plain sum of the terms is one number seen four times."""
    inputs = inputs_of(problem(9, 11, dtype=torch.float32))
    leaf = inputs.image.clone().requires_grad_()
    options = Options(0.1, 0.1, relational=True, interactive=True, cross=True)
    terms = torch.ops.tracer.contrastive_loss(impl, *inputs._replace(image=leaf), *options)[0]
    (got,) = torch.autograd.grad(terms.sum(), leaf, retain_graph=True)
    (expected,) = torch.autograd.grad(terms @ torch.ones_like(terms), leaf)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", ["auto", "eager", "blocked"])
def test_a_device_without_autocast(impl):
    """Shapes alone, on the meta device."""
    x = torch.empty(300, 16, device="meta", requires_grad=True)
    output = contrastive_loss(x, x, 10.0, impl=impl)
    output.loss.backward()
    assert output.loss.shape == ()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("impl", ["eager", "blocked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(impl, dtype):
    """Products in the autocast dtype, statistics and gradients in float32."""
    kwargs = problem(33, 33, dtype=torch.float32) | OPTIONS["all"]
    low = dict(kwargs)
    for name in ("image", "text", "teacher_image", "teacher_text"):
        low[name] = kwargs[name].to(dtype)
    expected, _ = loss_and_gradients(impl, low | {"feature": 0.0})
    with torch.autocast(DEVICE, dtype=dtype):
        output, gradients = loss_and_gradients(impl, kwargs | {"feature": 0.0})
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3
    with torch.autocast(DEVICE, dtype=dtype):
        by_torch = loss_and_gradients("eager", kwargs | {"feature": 0.0})
    truth = loss_and_gradients("eager", in_float64(kwargs) | {"feature": 0.0})
    assert_no_worse(results(output, gradients), results(*by_torch), results(*truth), SLACK[dtype])


@pytest.mark.parametrize("impl", ["eager", "blocked"])
def test_no_grad_saves_nothing(impl):
    kwargs = problem(9, 9)
    with torch.no_grad():
        loss = contrastive_loss(**(kwargs | {"image": kwargs["image"].requires_grad_()}), impl=impl).loss
    assert loss.grad_fn is None


def test_saved_for_backward_is_linear_in_n():
    """Bytes that autograd keeps: the features and ten statistics per pair, never an N×N matrix."""

    def saved(n):
        kwargs = problem(n, n, d=32, classes=0, dtype=torch.float32) | WEIGHTS | {"feature": 0.0}
        kept: dict[int, int] = {}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            contrastive_loss(**(kwargs | {"image": kwargs["image"].requires_grad_()}), impl="blocked")
        return sum(kept.values())

    features, statistics = 4 * 4 * 32, 10 * 4  # bytes a pair
    for n in (64, 128, 256):
        assert saved(n) <= n * (features + statistics) + 64


def test_double_backward_is_refused_by_name():
    kwargs = without_teacher(problem(9, 9))
    image = kwargs["image"].requires_grad_()
    (gradient,) = torch.autograd.grad(
        contrastive_loss(**kwargs, impl="blocked").loss, image, create_graph=True
    )
    with pytest.raises(NotImplementedError, match=r"double backward.*impl='eager'"):
        gradient.sum().backward()


def test_forward_mode_is_refused_by_name():
    kwargs = without_teacher(problem(9, 9))
    with forward_ad.dual_level():
        image = forward_ad.make_dual(kwargs["image"], torch.ones_like(kwargs["image"]))
        with pytest.raises(NotImplementedError, match=r"forward-mode AD.*impl='eager'"):
            contrastive_loss(**(kwargs | {"image": image}), impl="blocked")
        assert forward_ad.unpack_dual(
            contrastive_loss(**(kwargs | {"image": image}), impl="eager").loss
        ).tangent


def test_the_definition_can_be_differentiated_twice():
    kwargs = without_teacher(problem(4, 4, d=3))
    image = kwargs.pop("image").requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: contrastive_loss(x, **kwargs, impl="eager").loss, image)
