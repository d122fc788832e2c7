"""The blocked implementation against the definition: options, dtypes, and logits that need two walks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from loss_calls import (
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

from tracer.kernels import _blocked_gradients, _blocked_positives, _blocked_tile, contrastive_blocked
from tracer.kernels._blocked_positives import Listed, Masked, Positives
from tracer.kernels.contrastive import Inputs, Needs
from tracer.ops import contrastive_loss

# Of the contrastive term alone, whose gradients small batches form in the forward pass.
OPTIONS_ALONE = {name: OPTIONS[name] for name in ("clip", "mpm-nce")}

SHAPES = [
    (64, 64, 16, 0),  # a batch of pairs, no labels, whole tiles
    (33, 45, 16, 5),  # N < M, ragged tiles, several positives
    (45, 33, 12, 5),  # N > M
    (20, 20, 8, 1),  # one class: no negatives
    (24, 24, 8, 24),  # all distinct, by labels
    (1, 1, 8, 0),  # a single pair
    (5, 1, 8, 1),  # a single column
]


@pytest.fixture(params=["at once", "two walks"])
def either_way(request, monkeypatch):
    """The contrastive term alone: its gradients formed in the forward pass, as in small batches, or not."""
    if request.param == "two walks":
        monkeypatch.setattr(contrastive_blocked, "keeps", lambda *size: False)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("n", "m", "d", "classes"), SHAPES)
def test_blocked_equals_the_definition(n, m, d, classes, options, dtype):
    assert_right("blocked", problem(n, m, d, classes, dtype=dtype) | options, upstream=3.0)


@pytest.mark.parametrize("terms", [("cross",), ("interactive",), ("interactive", "cross")], ids="+".join)
def test_terms_of_the_cross_logits_alone_share_their_references(terms, monkeypatch):
    """Regression: beside a sigmoid, at a scale such as SigLIP's, the image's gradient was NaN.

    The log-sum-exps of s, which no term needs, were checked all the same; unshared references then gave 0 · ∞.
    """
    kwargs = problem(16, 16, scale=150.0, dtype=torch.float32) | {"contrast": "sigmoid", "logit_bias": -2.0}
    kwargs |= dict.fromkeys(("text", "teacher_image", "teacher_text"), kwargs["image"])
    made, slopes = [], contrastive_blocked.slopes

    def slopes_seen(*arguments):
        made.extend(slopes(*arguments))
        return made

    monkeypatch.setattr(contrastive_blocked, "slopes", slopes_seen)
    assert_right("blocked", kwargs | dict.fromkeys(terms, 0.7), 1e-5)
    assert all(isinstance(side.references["t"], float) for side in made)
    assert len(made) == 2


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS_ALONE.values(), ids=OPTIONS_ALONE)
@pytest.mark.parametrize(("n", "m", "d", "classes"), SHAPES)
def test_large_batches_take_two_walks(n, m, d, classes, options, dtype, monkeypatch):
    monkeypatch.setattr(contrastive_blocked, "keeps", lambda *size: size != (n, m, d))
    monkeypatch.setattr(contrastive_blocked, "_sums", once := Counted(contrastive_blocked._sums))
    assert_right("blocked", problem(n, m, d, classes, dtype=dtype) | options, upstream=3.0)
    assert once.calls == 1  # not a second time, in vain


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


@pytest.mark.parametrize("tiles", ["many", "one"])
@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=3))[1:], ids=str)
@pytest.mark.parametrize(
    "options", [{}, OPTIONS["mpm-nce"], {"directions": (1, 0)}, {"directions": (0.2, 0.8)}], ids=str
)
def test_small_batches_form_their_gradients_at_once(options, asked, tiles, request, monkeypatch):
    """Whatever is asked for; each product and each exponential of a tile once, and no backward walk."""
    if tiles == "many":
        request.getfixturevalue("small_tiles")
    monkeypatch.delattr(contrastive_blocked, "backward")
    visits = Counted(_blocked_tile.Logits.tile)
    monkeypatch.setattr(_blocked_tile.Logits, "tile", lambda *args: visits(*args))
    kwargs, expected = without_teacher(problem(33, 45)) | options, None
    names = [name for name, wanted in zip(Needs._fields, asked, strict=True) if wanted]
    for impl in ("eager", "blocked"):
        leaves = {name: kwargs[name].clone().requires_grad_() for name in names}
        loss = contrastive_loss(**(kwargs | leaves), impl=impl).loss
        got = [loss, *torch.autograd.grad(3 * loss, list(leaves.values()))]
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        expected = got
    assert visits.calls == (-(-33 // 16) * -(-45 // 8) if tiles == "many" else 1)


@pytest.mark.parametrize(
    ("size", "kept"),
    [
        ((1024, 1024, 8), True),
        ((1024, 1025, 8), False),
        ((2048, 2048, 512), True),
        ((2049, 2049, 512), False),
        ((8192, 8192, 512), False),
    ],
    ids=str,
)
def test_a_matrix_is_kept_up_to_the_size_of_features_and_gradients(size, kept):
    assert contrastive_blocked.keeps(*size) == kept


def test_rows_without_a_positive_and_rows_left_out_at_once():
    """NaN, or none of their business, as in two walks."""
    kwargs = without_teacher(problem(20, 24, classes=4)) | {"margin": 0.1, "smoothing": 0.1}
    kwargs["labels"][3], kwargs["text_labels"][5] = -1, -1
    assert_right("blocked", kwargs | {"ignore_index": -1}, upstream=3.0)
    kwargs["text_labels"][kwargs["text_labels"] == -1] = 77
    output, gradients = loss_and_gradients("blocked", kwargs)
    assert output.loss.isnan()
    assert gradients[0].isnan().all(1)[3]


def test_gradients_formed_at_once_serve_several_backward_passes():
    """A kept graph multiplies them anew, in float16 from float32, and refuses to be differentiated itself."""
    kwargs = without_teacher(problem(16, 16, classes=0, dtype=torch.float16))
    image = kwargs.pop("image").requires_grad_()
    loss = contrastive_loss(image, **kwargs, impl="blocked").loss
    once, tiny, again = (
        torch.autograd.grad(loss * k, image, retain_graph=True)[0] for k in (2**8, 2**-20, 2**8)
    )
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    assert once.dtype == torch.float16
    assert (tiny != 0).any()
    (slope,) = torch.autograd.grad(loss, image, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        slope.sum().backward()


def test_a_call_without_gradients_forms_none(monkeypatch):
    monkeypatch.delattr(_blocked_gradients.GradientWalk, "visit")
    kwargs = without_teacher(problem(16, 16))
    kwargs["image"].requires_grad_()
    with torch.no_grad():
        assert contrastive_loss(**kwargs, impl="blocked").loss.isfinite()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("share", [0.0, 2.0], ids=["masks", "lists"])
@pytest.mark.parametrize("options", OPTIONS_ALONE.values(), ids=OPTIONS_ALONE)
def test_positives_of_small_batches_may_be_masks_or_lists(options, share, monkeypatch):
    monkeypatch.setattr(_blocked_positives, "DENSE", share)
    kwargs = without_teacher(problem(33, 45, dtype=torch.float32)) | options
    assert_right("blocked", kwargs, 1e-5, upstream=3.0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("contrast", ["softmax", "one way", "sigmoid"])
@pytest.mark.parametrize("scale", [20.0, 1e3], ids=["one walk", "two walks"])
@pytest.mark.parametrize("share", [0.0, 2.0], ids=["masks", "lists"])
def test_positives_may_be_masks_or_lists(share, scale, contrast, monkeypatch):
    """Whatever share of a tile they are; with every option, and with references of rows and columns too."""
    monkeypatch.setattr(_blocked_positives, "DENSE", share)
    kwargs = (
        problem(33, 45, scale=scale, dtype=torch.float32) | OPTIONS["all"] | {"feature": 0.0, "stats": True}
    )
    if contrast == "one way":
        kwargs |= {"directions": (1, 0), "stats": False}
    if contrast == "sigmoid":
        kwargs |= {"contrast": "sigmoid", "smoothing": 0.0, "logit_bias": -2.0}
    output, expected = assert_right("blocked", kwargs, 1e-5, upstream=3.0)
    for name, value in expected.stats.items():
        if not name.endswith("effective_temperature"):  # a reciprocal of entropies near 0
            assert output.stats[name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-3), name


def test_few_classes_are_masks_and_many_are_lists():
    for classes, kind in ((1, Masked), (2, Masked), (8, Masked), (16, Listed)):
        y = torch.arange(128) % classes
        inputs = Inputs(torch.ones(128, 8), torch.ones(128, 8), torch.ones(()), labels=y, text_labels=y)
        positives = Positives(inputs, torch.float32)
        assert isinstance(positives.tile(slice(0, 128), slice(0, 128)), kind)
    other = Positives(inputs._replace(text_labels=y + 64), torch.float32)
    assert other.tile(slice(0, 128), slice(0, 128)) is None


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mkl", [True, False])
def test_blocked_with_either_library_of_products(mkl, monkeypatch):
    """A machine takes one of the two for float32; both must be right on all."""
    monkeypatch.setattr(_blocked_tile, "mkl_knows_this_processor", lambda: mkl)
    kwargs = problem(45, 33, 16, 5, dtype=torch.float32) | OPTIONS["all"]
    assert_right("blocked", kwargs, upstream=3.0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("scale", [100.0, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_large_logits(scale, dtype):
    """From 100 on some sums leave the range of one shared exponential; ±1e4 is far beyond float32's."""
    kwargs = problem(33, 45, scale=scale, dtype=dtype) | OPTIONS["all"] | {"feature": 0.0, "stats": True}
    output, expected = assert_right("blocked", kwargs)
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
    for half in (contrastive_blocked, _blocked_gradients):  # no sum is large enough: always the second walk
        monkeypatch.setattr(half, "LOWEST", 1e9)
    exact, exact_gradients = loss_and_gradients("blocked", kwargs)
    torch.testing.assert_close(exact, fast, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exact_gradients, fast_gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("small_tiles", "either_way")
def test_a_wide_spread_of_rows_needs_the_exact_walk():
    """One row whose best logit is 180 below another's: sums with one reference would be 0."""
    kwargs = without_teacher(problem(24, 24, classes=0, scale=100.0, dtype=torch.float32))
    kwargs["image"][3] = -kwargs["text"].mean(0) * 3
    kwargs["text"][5] = kwargs["image"][5]
    assert_right("blocked", kwargs, 1e-5)


def spy(monkeypatch, name):
    """Record the calls of a function of the blocked implementation."""
    calls, function = [], getattr(contrastive_blocked, name)
    monkeypatch.setattr(contrastive_blocked, name, lambda *args: calls.append(args) or function(*args))
    return calls


@pytest.mark.usefixtures("small_tiles")
def test_unit_features_at_the_largest_scale_of_clip_need_no_second_walk(monkeypatch):
    """A peaked teacher, σ' = 100 with equal pairs: the references leave room for weighted sums too."""
    kwargs = problem(33, 33, classes=0, scale=100.0, dtype=torch.float32)
    kwargs |= {"teacher_text": kwargs["teacher_image"], "teacher_logit_scale": 100.0, **WEIGHTS}
    second_walks = spy(monkeypatch, "_maxima")
    assert_right("blocked", kwargs | {"feature": 0.0, "stats": True})
    assert not second_walks


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("stats", [False, True])
def test_weighted_sums_may_overflow_before_plain_ones(stats):
    """Teacher features of norm 1.25: exponentials near 2**124 add up, times their logits they do not."""
    kwargs = problem(33, 33, classes=0, scale=10.0, dtype=torch.float32)
    kwargs["teacher_image"] = kwargs["teacher_text"] = 1.25 * kwargs["image"]
    kwargs |= {"teacher_logit_scale": 55.0, "relational": 1.0, "cross": 1.0, "stats": stats}
    output, expected = assert_right("blocked", kwargs)
    for name, value in expected.stats.items():
        if not name.endswith("effective_temperature"):  # a reciprocal of entropies near 0
            assert output.stats[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-4), name
    _, gradients = loss_and_gradients("blocked", kwargs)
    _, small = loss_and_gradients("blocked", kwargs, upstream=2.0**-12)  # no factor is subnormal
    for got, expected in zip(small, gradients, strict=True):
        torch.testing.assert_close(2.0**12 * got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_tiles", "either_way")
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
    output, _ = assert_right("blocked", kwargs | {"margin": margin}, 2e-5)
    assert output.loss > 0.5


@pytest.mark.usefixtures("small_tiles", "either_way")
@pytest.mark.parametrize("cosine", [-0.3, -0.4, -0.45, -0.5, -0.55, -0.6])
def test_a_row_whose_exponentials_are_nearly_or_all_zero(cosine):
    """One image far from every text at σ = 100: its sum falls through the subnormal numbers to 0."""
    generator = torch.Generator().manual_seed(0)
    near = F.normalize(torch.eye(8)[0] + 0.05 * torch.randn(24, 8, generator=generator), dim=1).to(DEVICE)
    image, text = near.clone(), near.flip(0)
    image[5] = torch.tensor([cosine, math.sqrt(1 - cosine**2), *[0.0] * 6])
    assert_right(
        "blocked", {"image": image, "text": text, "logit_scale": torch.tensor(100.0, device=DEVICE)}, 2e-5
    )


@pytest.mark.parametrize("kept", [False, True], ids=["two walks", "at once"])
def test_half_precision_keeps_small_slopes(kept, monkeypatch):
    """N 2048: in float16 the slope of a negative, about 1/N², would have two bits, or none."""
    monkeypatch.setattr(contrastive_blocked, "keeps", lambda *size: kept)
    n = 2048
    kwargs = without_teacher(problem(n, n, d=8, classes=0, scale=10.0, dtype=torch.float16))
    _, got = loss_and_gradients("blocked", kwargs)
    _, expected = loss_and_gradients("eager", in_float64(kwargs))
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() < 1e-3 * b.norm()
