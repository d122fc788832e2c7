"""``tracer.ops.contrastive_loss``: every implementation against the definition in float64, and its manners."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter  # noqa: F401  makes the interpreter right, where there is no GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from tracer import ops
from tracer.kernels import blocked, contrastive, eager
from tracer.ops import contrastive_loss, sampled_diagnostics

# numpy, in the interpreter, warns of lanes that a mask throws away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHTS = {"relational": 1.0, "interactive": 0.7, "cross": 0.5, "feature": 20.0}
ALL_IMPLS = ("eager", "blocked", "triton")

# Relative error of loss and gradients (norms) that each dtype may have against float64 on the same inputs.
# bfloat16 products are rounded to 8 bits, in the definition as well.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 × 8, so that a small problem has many, with ragged edges."""
    monkeypatch.setattr(blocked, "ROWS", 16)
    monkeypatch.setattr(blocked, "COLS", 8)


def problem(n, m, d=16, classes=5, scale=20.0, seed=0, dtype=torch.float64):
    """Keyword arguments of a call on ``n`` images and ``m`` texts; ``classes=0`` for no labels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows):
        x = F.normalize(torch.randn(rows, d, generator=generator, dtype=torch.float64), dim=1)
        return x.to(dtype).to(DEVICE)

    labels = {}
    if classes:
        y = torch.randint(classes, (n,), generator=generator)
        y_text = torch.randint(classes, (m,), generator=generator)
        k = min(n, m)  # every label that occurs on one side occurs on the other
        y[:k], y_text[:k] = torch.arange(k) % classes, torch.arange(k) % classes
        y, y_text = y % min(k, classes), y_text % min(k, classes)
        labels = {"labels": y.to(DEVICE), "text_labels": y_text.to(DEVICE)}
    return {
        "image": draw(n),
        "text": draw(m),
        "logit_scale": torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE),
        **labels,
        "teacher_image": draw(n),
        "teacher_text": draw(m),
        "teacher_logit_scale": 1.1 * scale,
    }


def without_teacher(kwargs):
    return {name: value for name, value in kwargs.items() if not name.startswith("teacher")}


def in_float64(kwargs):
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.dtype.is_floating_point else x
        for name, x in kwargs.items()
    }


def loss_and_gradients(impl, kwargs, upstream=1.0, term=None):
    kwargs = dict(kwargs)
    leaves = [kwargs.pop(name).clone().requires_grad_() for name in ("image", "text", "logit_scale")]
    output = contrastive_loss(*leaves, impl=impl, **kwargs)
    value = output.loss if term is None else output.terms[term]
    return output, torch.autograd.grad(upstream * value, leaves, allow_unused=True)


def error(got, expected):
    """‖got − expected‖ relative to ‖expected‖, absolute where that is below 1 (a single pair has loss 0)."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    return float((got - expected).norm() / expected.norm().clamp(min=1.0))


def assert_same(impl, kwargs, tolerance, **how):
    output, gradients = loss_and_gradients(impl, kwargs, **how)
    expected, expected_gradients = loss_and_gradients("eager", in_float64(kwargs), **how)
    assert error(output.loss, expected.loss) < tolerance
    for name, term in output.terms.items():
        assert error(term, expected.terms[name]) < tolerance, name
    for name, got, wanted in zip(("image", "text", "scale"), gradients, expected_gradients, strict=True):
        assert (got is None) == (wanted is None), name
        if got is not None:
            assert got.shape == wanted.shape
            assert error(got, wanted) < tolerance, name
    return output, expected


SHAPES = [
    (64, 64, 16, 0),  # a batch of pairs, no labels, whole tiles
    (33, 45, 16, 5),  # N < M, ragged tiles, several positives
    (45, 33, 12, 5),  # N > M
    (20, 20, 8, 1),  # one class: no negatives
    (24, 24, 8, 24),  # all distinct, by labels
    (1, 1, 8, 0),  # a single pair
    (5, 1, 8, 1),  # a single column
]
OPTIONS = {
    "clip": {},
    "mpm-nce": {"margin": 0.05, "smoothing": 0.05},
    "relational": {"relational": 1.0},
    "interactive": {"interactive": 1.0},
    "cross": {"cross": 1.0},
    "all": {**WEIGHTS, "margin": 0.05, "smoothing": 0.05, "teacher_temperature": 2.0},
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("n", "m", "d", "classes"), SHAPES)
def test_blocked_equals_the_definition(n, m, d, classes, options, dtype):
    assert_same("blocked", problem(n, m, d, classes, dtype=dtype) | options, TOLERANCE[dtype], upstream=3.0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mkl", [True, False])
def test_blocked_with_either_library_of_products(mkl, monkeypatch):
    """A machine takes one of the two for float32; both must be right on all."""
    monkeypatch.setattr(blocked, "_mkl_knows_this_processor", lambda: mkl)
    kwargs = problem(45, 33, 16, 5, dtype=torch.float32) | OPTIONS["all"]
    assert_same("blocked", kwargs, TOLERANCE[torch.float32], upstream=3.0)


@pytest.mark.parametrize("options", [OPTIONS["clip"], OPTIONS["all"]], ids=["clip", "all"])
@pytest.mark.parametrize(("n", "m", "classes"), [(33, 45, 5), (24, 24, 0)])
def test_triton_through_the_same_call(n, m, classes, options):
    assert_same("triton", problem(n, m, 16, classes, dtype=torch.float32) | options, 1e-5, upstream=3.0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("scale", [100.0, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_large_logits(scale, dtype):
    """From 100 on some sums leave the range of one shared exponential; ±1e4 is far beyond float32's."""
    kwargs = problem(33, 45, scale=scale, dtype=dtype) | OPTIONS["all"] | {"feature": 0.0, "stats": True}
    output, expected = assert_same("blocked", kwargs, TOLERANCE[dtype])
    assert output.loss.isfinite()
    for name, value in expected.stats.items():
        if name.endswith("effective_temperature"):
            continue  # a reciprocal of entropies near 0
        assert output.stats[name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-3), name


@pytest.mark.usefixtures("small_tiles")
def test_one_shared_exponential_and_exact_maxima_agree(monkeypatch):
    """The two walks of the blocked implementation give the same numbers where both may be used."""
    kwargs = problem(33, 45) | OPTIONS["all"] | {"stats": True}
    fast, fast_gradients = loss_and_gradients("blocked", kwargs)
    monkeypatch.setattr(blocked, "_LOWEST", 1e9)  # no sum is large enough: always the second walk
    exact, exact_gradients = loss_and_gradients("blocked", kwargs)
    torch.testing.assert_close(exact, fast, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exact_gradients, fast_gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("small_tiles")
def test_a_wide_spread_of_rows_needs_the_exact_walk():
    """One row whose best logit is 180 below another's: sums with one reference would be 0."""
    kwargs = without_teacher(problem(24, 24, classes=0, scale=100.0, dtype=torch.float32))
    kwargs["image"][3] = -kwargs["text"].mean(0) * 3
    kwargs["text"][5] = kwargs["image"][5]
    assert_same("blocked", kwargs, 1e-5)


def spy(monkeypatch, name):
    """Count the calls of a function of ``blocked``."""
    calls, function = [], getattr(blocked, name)
    monkeypatch.setattr(blocked, name, lambda *args: calls.append(args) or function(*args))
    return calls


@pytest.mark.usefixtures("small_tiles")
def test_unit_features_at_the_largest_scale_of_clip_need_no_second_walk(monkeypatch):
    """A peaked teacher, σ' = 100 with equal pairs: the references leave room for weighted sums too."""
    kwargs = problem(33, 33, classes=0, scale=100.0, dtype=torch.float32)
    kwargs |= {"teacher_text": kwargs["teacher_image"], "teacher_logit_scale": 100.0, **WEIGHTS}
    second_walks = spy(monkeypatch, "_maxima")
    assert_same("blocked", kwargs | {"feature": 0.0, "stats": True}, TOLERANCE[torch.float32])
    assert not second_walks


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("stats", [False, True])
def test_weighted_sums_may_overflow_before_plain_ones(stats):
    """Teacher features of norm 1.25: exponentials near 2**124 add up, times their logits they do not."""
    kwargs = problem(33, 33, classes=0, scale=10.0, dtype=torch.float32)
    kwargs["teacher_image"] = kwargs["teacher_text"] = 1.25 * kwargs["image"]
    kwargs |= {"teacher_logit_scale": 55.0, "relational": 1.0, "cross": 1.0, "stats": stats}
    output, expected = assert_same("blocked", kwargs, TOLERANCE[torch.float32])
    for name, value in expected.stats.items():
        if not name.endswith("effective_temperature"):  # a reciprocal of entropies near 0
            assert output.stats[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-4), name
    _, gradients = loss_and_gradients("blocked", kwargs)
    _, small = loss_and_gradients("blocked", kwargs, upstream=2.0**-12)  # no factor is subnormal
    for got, expected in zip(small, gradients, strict=True):
        torch.testing.assert_close(2.0**12 * got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("margin", "cosine"),
    [
        (2.0, -1.0),  # 288 bits below the positives: the negatives' exponentials are 0 without the margin
        (1.58, -0.58),  # 228 bits: they are subnormal, with a few bits left
        (1.45, -0.45),  # 209 bits: of full precision, but their slopes exceed float32
    ],
)
def test_a_large_margin_lifts_negatives_that_were_far_below(margin, cosine):
    """Two groups of texts, σ = 100. The margin makes negatives and positives about equal."""
    angle = math.acos(cosine) + torch.linspace(0, 0.01, 12).repeat_interleave(2)
    angle[::2] = 0.0
    image = torch.stack([angle.cos(), angle.sin(), *[torch.zeros(24)] * 6], 1).to(DEVICE)
    y = (torch.arange(24) % 2).to(DEVICE)
    scale = torch.tensor(100.0, device=DEVICE)
    kwargs = {
        "image": image,
        "text": image.flip(0),
        "logit_scale": scale,
        "labels": y,
        "text_labels": y.flip(0),
    }
    output, _ = assert_same("blocked", kwargs | {"margin": margin}, 2e-5)
    assert output.loss > 0.5


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("cosine", [-0.3, -0.4, -0.45, -0.5, -0.55, -0.6])
def test_a_row_whose_exponentials_are_nearly_or_all_zero(cosine):
    """One image far from every text at σ = 100: its sum falls through the subnormal numbers to 0."""
    generator = torch.Generator().manual_seed(0)
    near = F.normalize(torch.eye(8)[0] + 0.05 * torch.randn(24, 8, generator=generator), dim=1).to(DEVICE)
    image, text = near.clone(), near.flip(0)
    image[5] = torch.tensor([cosine, math.sqrt(1 - cosine**2), *[0.0] * 6])
    assert_same(
        "blocked", {"image": image, "text": text, "logit_scale": torch.tensor(100.0, device=DEVICE)}, 2e-5
    )


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


def test_half_precision_keeps_small_slopes():
    """N 2048: in float16 the slope of a negative, about 1/N², would have two bits, or none."""
    n = 2048
    kwargs = without_teacher(problem(n, n, d=8, classes=0, scale=10.0, dtype=torch.float16))
    _, got = loss_and_gradients("blocked", kwargs)
    _, expected = loss_and_gradients("eager", in_float64(kwargs))
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() < 1e-3 * b.norm()


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
    assert_same(impl, problem(13, 17, scale=0.0, dtype=torch.float32) | OPTIONS["all"], 1e-5)


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("term", [*eager.TERMS, "feature"])
def test_gradient_of_a_single_term(impl, term):
    """Terms can be differentiated one by one, whatever their weights."""
    kwargs = problem(13, 17, dtype=torch.float32) | OPTIONS["all"]
    assert_same(impl, kwargs, 2e-5, term=term, upstream=-2.0)


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


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("has_teacher", [True, False])
def test_stats(impl, has_teacher):
    kwargs = problem(33, 45, dtype=torch.float32) | {"stats": True, "margin": 0.05}
    kwargs = kwargs if has_teacher else without_teacher(kwargs)
    stats = contrastive_loss(**kwargs, impl=impl).stats
    expected = contrastive_loss(**in_float64(kwargs), impl="eager").stats
    assert set(stats) == set(expected) >= set(eager.stat_names(has_teacher))
    for name, value in expected.items():
        assert stats[name].ndim == 0
        assert not stats[name].requires_grad
        assert stats[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    entropy = stats["student/image_to_text/entropy"]
    assert stats["student/image_to_text/effective_temperature"].item() == pytest.approx(
        math.log(45) / entropy
    )
    assert not contrastive_loss(**(kwargs | {"stats": False}), impl=impl).stats


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_a_tie_is_decided_for_the_first(impl):
    """Twenty copies of every image and text, over many tiles; only the first copies belong together."""
    x = torch.eye(8, device=DEVICE).repeat(20, 1)
    y = torch.arange(160, device=DEVICE) % 8
    y_text = torch.where(torch.arange(160, device=DEVICE) < 8, y, (y + 1) % 8)
    student = contrastive_loss(x, x, 5.0, labels=y, text_labels=y_text, stats=True, impl=impl).stats
    assert student["student/image_to_text/accuracy"].item() == pytest.approx(1)
    student = contrastive_loss(x, x, 5.0, labels=y_text, text_labels=y, stats=True, impl=impl).stats
    assert student["student/text_to_image/accuracy"].item() == pytest.approx(1)


def test_sampled_diagnostics():
    eye = torch.eye(8)
    same = sampled_diagnostics(eye, eye, eye, eye, rows=4)
    assert same["top5_overlap"] == 1
    assert same["student/diversity"] == 1
    collapsed = eye[:1].expand(8, 8)
    named = sampled_diagnostics(collapsed, eye, eye, eye)
    assert named["student/diversity"] == 1 / 8
    assert named["teacher/diversity"] == 1
    with pytest.raises(ValueError, match="rows must be at least 1"):
        sampled_diagnostics(eye, eye, eye, eye, rows=0)


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


# ---------------------------------------------------------------------------------------------------
# Integration with autograd, autocast and torch.compile.


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
    kwargs = problem(9, 9, classes=3, dtype=dtype)
    tensors = [kwargs[name] for name in ("image", "text", "logit_scale")]
    tensors += [kwargs[name] if labelled else None for name in ("labels", "text_labels")]
    tensors += [kwargs[name] if has_teacher else None for name in ("teacher_image", "teacher_text")]
    tensors += [torch.tensor(20.0, device=DEVICE) if has_teacher else None]
    enabled = [True, *[has_teacher] * 3]
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    torch.library.opcheck(
        torch.ops.tracer.contrastive_loss, (impl, *leaves, *tensors[3:], 0.1, 0.1, enabled, True)
    )
    terms, rows, cols, _ = torch.ops.tracer.contrastive_loss(impl, *tensors, 0.1, 0.1, enabled, False)
    for needs in ([True, True, True], [False, True, False]):
        torch.library.opcheck(
            torch.ops.tracer.contrastive_loss_backward,
            (impl, torch.ones_like(terms), *tensors, rows, cols, 0.1, 0.1, enabled, needs),
        )


@pytest.mark.parametrize("impl", ["blocked", "triton"])
def test_upstream_gradient_may_have_any_strides(impl):
    """The gradient of a plain sum of the terms is one number seen four times."""
    kwargs = problem(9, 11, dtype=torch.float32)
    tensors = [kwargs[name] for name in ("image", "text", "logit_scale", "labels", "text_labels")]
    tensors += [kwargs["teacher_image"], kwargs["teacher_text"], torch.tensor(20.0, device=DEVICE)]
    leaf = tensors[0] = tensors[0].clone().requires_grad_()
    terms = torch.ops.tracer.contrastive_loss(impl, *tensors, 0.1, 0.1, [True] * 4, False)[0]
    (got,) = torch.autograd.grad(terms.sum(), leaf, retain_graph=True)
    (expected,) = torch.autograd.grad(terms @ torch.ones_like(terms), leaf)
    torch.testing.assert_close(got, expected)


def test_auto_on_a_gpu_takes_the_kernels_for_the_widths_they_can_take():
    """Seen through tensors that only pretend to be on a GPU, so that it is checked without one."""
    with FakeTensorMode():
        for width, impl in ((16, "triton"), (12, "blocked")):
            x = torch.empty(300, width, device="cuda")
            assert ops._resolve("auto", x, x) == impl


def test_implementations_keep_the_same_number_of_statistics():
    kwargs = problem(9, 11, dtype=torch.float32)
    tensors = [kwargs[name] for name in ("image", "text", "logit_scale", "labels", "text_labels")]
    for module in (blocked, contrastive):
        _, rows, cols, _ = module.forward(*tensors, *[None] * 3, 0.0, 0.0, (True, False, False, False), False)
        assert rows.shape == (eager.STAT_ROWS, 9)
        assert cols.shape == (eager.STAT_ROWS, 11)


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
    assert (
        error(gradients[0], loss_and_gradients("eager", kwargs | {"feature": 0.0})[1][0]) < TOLERANCE[dtype]
    )


@pytest.mark.parametrize("impl", ["eager", "blocked"])
def test_no_grad_saves_nothing(impl):
    kwargs = problem(9, 9)
    with torch.no_grad():
        loss = contrastive_loss(**(kwargs | {"image": kwargs["image"].requires_grad_()}), impl=impl).loss
    assert loss.grad_fn is None


@pytest.mark.parametrize(("n", "tiled"), [(256, False), (257, True)])
def test_auto_tiles_only_what_is_large(monkeypatch, n, tiled):
    """On a CPU; a batch whose matrices fit a cache goes to the definition, which is as fast there."""
    calls, forward = [], blocked.forward

    def counted(*args):
        calls.append(args)
        return forward(*args)

    monkeypatch.setattr(blocked, "forward", counted)
    x = F.normalize(torch.randn(n, 8, dtype=torch.float64), dim=1)
    assert contrastive_loss(x, x, 5.0).loss.isfinite()
    assert bool(calls) == tiled


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


# ---------------------------------------------------------------------------------------------------
# Refusals: one line that names the thing and the remedy.

EMPTY = torch.empty(0, 16, dtype=torch.float64)
REFUSALS = {
    "empty batch": ({"image": EMPTY, "text": EMPTY}, "image is empty.*skip empty batches"),
    "not a matrix": ({"image": torch.zeros(16)}, r"image must be \[rows, D\]"),
    "widths": ({"text": torch.zeros(9, 12, dtype=torch.float64)}, "D = 16 but text has D = 12"),
    "dtypes": ({"text": torch.zeros(9, 16)}, "image is torch.float64 but text torch.float32; cast"),
    "devices": ({"text": torch.zeros(9, 16, dtype=torch.float64, device="meta")}, "text on meta; move both"),
    "unpaired": ({"text": torch.zeros(7, 16, dtype=torch.float64)}, "9 images but 7 texts; pass labels"),
    "labels' length": (
        {"labels": torch.zeros(8, dtype=torch.long)},
        r"labels must have shape \(9,\), got \(8,\)",
    ),
    "labels' dtype": ({"labels": torch.zeros(9)}, "labels must be integers, got torch.float32"),
    "labels' device": ({"labels": torch.zeros(9, dtype=torch.long, device="meta")}, "labels is on meta"),
    "only text_labels": ({"text_labels": torch.zeros(9, dtype=torch.long)}, "text_labels needs labels"),
    "margin": ({"margin": -0.1}, "margin must be a finite number >= 0, got -0.1"),
    "margin nan": ({"margin": math.nan}, "margin must be a finite number"),
    "smoothing": ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\), got 1.0"),
    "temperature": ({"teacher_temperature": 0.0}, "teacher_temperature must be a finite number > 0"),
    "no teacher": ({"relational": 0.5}, "weight relational = 0.5 needs a teacher"),
    "half a teacher": ({"teacher_image": torch.zeros(9, 16)}, "teacher_text is missing"),
    "teacher's shape": (
        {"teacher_image": torch.zeros(9, 12), "teacher_text": torch.zeros(9, 16)},
        r"teacher_image must have the student's shape \(9, 16\)",
    ),
    "negative weight": ({"cross": -1.0}, "weight cross must be a finite number >= 0"),
    "logit_scale": ({"logit_scale": torch.ones(3)}, "logit_scale must hold one element"),
    "impl": ({"impl": "cuda"}, "unknown impl 'cuda'; choose one of auto, triton, blocked, eager"),
    "triton float64": (
        {"impl": "triton"},
        "'triton' cannot take torch.float64 features; use impl blocked, eager",
    ),
    "triton's width": (
        {"impl": "triton", "image": torch.zeros(9, 12), "text": torch.zeros(9, 12)},
        "'triton' needs D to be a multiple of 8, got D = 12; use impl='blocked'",
    ),
    "integers": (
        {"image": torch.zeros(9, 16).long(), "text": torch.zeros(9, 16).long()},
        "cast the features",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(change, message):
    kwargs = without_teacher(problem(9, 9, classes=0))
    kwargs = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
    with pytest.raises(ValueError, match=message) as caught:
        contrastive_loss(**(kwargs | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["image", "text"])
def test_integers_are_refused_under_autocast_too(name):
    kwargs = without_teacher(problem(9, 9, dtype=torch.float32, classes=0))
    kwargs[name] = kwargs[name].long()
    with (
        torch.autocast(DEVICE, dtype=torch.bfloat16),
        pytest.raises(ValueError, match=f"{name} must be floating point, got torch.int64; cast the features"),
    ):
        contrastive_loss(**kwargs)


def test_process_group_is_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"process group is not supported yet.*group=None"):
        contrastive_loss(**without_teacher(problem(9, 9)), group=object())


def test_triton_on_a_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kwargs = {name: x.cpu().float() for name, x in without_teacher(problem(9, 9, classes=0)).items()}
    with pytest.raises(ValueError, match=r"'triton' needs a GPU.*use impl='blocked'"):
        contrastive_loss(**kwargs, impl="triton")
