"""The loss modules: drop-ins for open_clip's, and the published objectives."""

from __future__ import annotations

import copy
import inspect
import pickle

import open_clip.loss
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks import published
from tracer import losses
from tracer.kernels.contrastive import TERMS
from tracer.losses import ClipLoss, MPMNCELoss, SigLipLoss, TracerLoss
from tracer.ops import contrastive_loss


def pairs(n=48, d=32, dtype=torch.float64, scale=30.0, seed=0):
    """u, v, σ as leaves, then a teacher's three."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1).to(dtype)  # noqa: E731
    student = [
        draw().requires_grad_(),
        draw().requires_grad_(),
        torch.tensor(scale, dtype=dtype, requires_grad=True),
    ]
    return student, (draw(), draw(), torch.tensor(1.2 * scale, dtype=dtype))


def assert_same_gradients(loss, expected, leaves, **tolerance):
    torch.testing.assert_close(loss, expected, **tolerance)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves, retain_graph=True),
        torch.autograd.grad(expected, leaves, retain_graph=True),
        **tolerance,
    )


@pytest.mark.parametrize("impl", ["eager", "blocked"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_clip_loss_equals_open_clips(impl, dtype, tolerance):
    student, _ = pairs(dtype=dtype, scale=10.0)
    theirs = open_clip.loss.ClipLoss()(*student)
    assert_same_gradients(ClipLoss(impl=impl)(*student), theirs, student, rtol=tolerance, atol=tolerance)


def test_clip_loss_takes_open_clips_arguments():
    theirs = inspect.signature(open_clip.loss.ClipLoss.__init__).parameters
    ours = inspect.signature(ClipLoss.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == parameter.default for name, parameter in theirs.items())
    theirs = inspect.signature(open_clip.loss.ClipLoss.forward).parameters
    ours = inspect.signature(ClipLoss.forward).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert list(ours)[len(theirs) :] == ["labels"]


# ---------------------------------------------------------------------------------------------------
# SigLipLoss: what open_clip's own tests check of its loss (tests/test_siglip_chunked_loss.py there, and how a
# chunk's size, a locked tower, autocast and a missing bias change nothing).


def siglip_leaves(n=64, m=64, needs=(1, 1, 1, 1), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    draw = lambda rows: F.normalize(torch.randn(rows, 32, generator=generator, dtype=torch.float64), dim=1)  # noqa: E731
    tensors = (draw(n), draw(m), torch.tensor(10.0), torch.tensor(-10.0))
    return [x.to(dtype).requires_grad_(bool(need)) for x, need in zip(tensors, needs, strict=True)]


def written_out(u, v, scale, bias=0.0, negative_only=False):
    logits = scale * u @ v.T + bias
    y = -torch.ones_like(logits)
    if not negative_only:
        y.diagonal().fill_(1)
    return -F.logsigmoid(y * logits).sum() / len(u)


def test_siglip_loss_takes_open_clips_arguments():
    theirs = inspect.signature(open_clip.loss.SigLipLoss.__init__).parameters
    ours = inspect.signature(SigLipLoss.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert list(ours)[len(theirs)] == "chunk_size"  # of open_clip's next release
    assert all(ours[name].default == parameter.default for name, parameter in theirs.items())
    theirs = inspect.signature(open_clip.loss.SigLipLoss.forward).parameters
    ours = inspect.signature(SigLipLoss.forward).parameters
    assert list(ours) == [*theirs, "labels"]
    assert all(ours[name].default == parameter.default for name, parameter in theirs.items())


def test_siglip_loss_must_be_given_a_bias_as_open_clips():
    """Regression: left out, it was 0, and another loss was taken."""
    *leaves, _ = siglip_leaves()
    for made in (SigLipLoss, open_clip.loss.SigLipLoss):
        with pytest.raises(TypeError, match="logit_bias"):
            made()(*leaves)
    theirs = open_clip.loss.SigLipLoss()(*leaves, None)
    torch.testing.assert_close(SigLipLoss()(*leaves, None), theirs, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("impl", ["eager", "blocked"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_siglip_loss_equals_open_clips(impl, dtype, tolerance):
    leaves = siglip_leaves(dtype=dtype)
    theirs = open_clip.loss.SigLipLoss()(*leaves)
    assert_same_gradients(SigLipLoss(impl=impl)(*leaves), theirs, leaves, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_size", [0, 1, 7, 64])
@pytest.mark.parametrize("negative_only", [False, True])
@pytest.mark.parametrize(("n", "m"), [(19, 19), (19, 11), (11, 19)])
@pytest.mark.parametrize("needs", [(1, 1, 1, 1), (0, 1, 1, 1), (1, 0, 1, 1), (0, 0, 1, 1)])
def test_a_block_of_any_shape(chunk_size, negative_only, n, m, needs):
    leaves = siglip_leaves(n, m, needs)
    asked = [x for x in leaves if x.requires_grad]
    got = SigLipLoss(chunk_size=chunk_size)._loss(*leaves, negative_only=negative_only)
    expected = written_out(*leaves, negative_only=negative_only)
    assert_same_gradients(got, expected, asked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_siglip_loss_under_autocast_and_without_a_bias(with_bias, enabled):
    leaves = siglip_leaves(35, 35)[: 3 + with_bias]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        plain, chunked = SigLipLoss()._loss(*leaves), SigLipLoss(chunk_size=8)._loss(*leaves)
    assert_same_gradients(chunked, plain, leaves, rtol=1e-5, atol=1e-5)
    assert_same_gradients(plain, written_out(*leaves), leaves, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_siglip_loss_of_large_logits_in_low_precision(dtype):
    """All pairs of logit 10: their sum exceeds float16's range, the loss is float32's."""
    zeros = torch.zeros(256, 8, dtype=dtype, requires_grad=True)
    bias = torch.full((), 10, dtype=dtype)
    loss = SigLipLoss()(zeros, zeros, torch.ones((), dtype=dtype), bias)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, written_out(zeros.float(), zeros.float(), 1.0, 10.0), rtol=2e-4, atol=2e-3
    )
    loss.backward()
    assert zeros.grad.isfinite().all()


def test_siglip_loss_without_a_graph_and_as_a_dictionary():
    leaves = siglip_leaves()
    with torch.no_grad():
        loss = SigLipLoss(chunk_size=7)(*leaves, output_dict=True)["contrastive_loss"]
    assert not loss.requires_grad
    torch.testing.assert_close(loss, SigLipLoss()(*leaves).detach())


@pytest.mark.parametrize("dist_impl", ["bidir", "shift", "reduce", "gather", None])
def test_siglip_loss_accepts_each_exchange(dist_impl):
    assert SigLipLoss(dist_impl=dist_impl).dist_impl == (dist_impl or "bidir")


def test_siglip_loss_with_labels():
    leaves, labels = siglip_leaves(), torch.arange(64) % 7
    expected = contrastive_loss(
        *leaves[:3], contrast="sigmoid", logit_bias=leaves[3], labels=labels, impl="eager"
    ).loss
    torch.testing.assert_close(SigLipLoss()(*leaves, labels=labels), expected)


def test_what_siglip_loss_refuses(monkeypatch):
    monkeypatch.setattr("tracer.losses.dist.is_initialized", lambda: False)
    with pytest.raises(
        ValueError, match="unknown dist_impl 'ring'; choose one of bidir, shift, reduce, gather"
    ):
        SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match="chunk_size must be >= 0, got -1"):
        SigLipLoss(chunk_size=-1)
    with pytest.raises(ValueError, match="SigLipLoss: world_size = 2, but there is no process group"):
        SigLipLoss(world_size=2)(*siglip_leaves())


def test_one_direction_of_the_clip_loss():
    student, _ = pairs()
    both, rows, cols = (ClipLoss(directions=d)(*student) for d in ((0.5, 0.5), (1, 0), (0, 1)))
    torch.testing.assert_close(both, 0.5 * (rows + cols))
    assert MPMNCELoss(directions=(1, 0)).directions == (1, 0)


def test_tracer_loss_takes_every_form():
    student, teacher = pairs()
    labels = torch.arange(48) % 7
    labels[:4] = -1
    bias = torch.tensor(-5.0, dtype=torch.float64, requires_grad=True)
    weights = {"relational": 0.9, "interactive": 0.9, "cross": 0.9, "feature": 1800.0}
    given = {"teacher_image": teacher[0], "teacher_text": teacher[1], "teacher_logit_scale": teacher[2]}
    for form, biases in (
        ({"contrast": "sigmoid"}, {"logit_bias": bias, "teacher_logit_bias": -4.0}),
        ({"directions": (1.0, 0.0), "ignore_index": -1}, {}),
    ):
        made = TracerLoss(**form, projection_product=0)
        loss = made(*student, teacher=teacher, labels=labels, **biases).loss
        expected = contrastive_loss(
            *student, labels=labels, **given, **weights, **form, **biases, impl="eager"
        ).loss
        leaves = [*student, *([bias] if biases else [])]
        assert_same_gradients(loss, expected, leaves, rtol=1e-9, atol=1e-9)
    plain = TracerLoss(projection_product=0)
    unused = plain(*student, teacher=teacher, labels=labels, logit_bias=bias).loss
    assert unused == plain(*student, teacher=teacher, labels=labels).loss


def test_tracer_loss_takes_the_output_of_a_teacher_with_a_bias():
    student, teacher = pairs()
    loss = TracerLoss(contrast="sigmoid", projection_product=0)
    expected = loss(*student, teacher=teacher, logit_bias=-5.0, teacher_logit_bias=-4.0).loss
    biased = (*teacher, torch.tensor(-4.0))
    assert loss(*student, teacher=biased, logit_bias=-5.0).loss == expected
    assert loss(*student, teacher=biased, logit_bias=-5.0, teacher_logit_bias=-3.0).loss != expected


def test_dictionary_of_losses():
    student, teacher = pairs()
    assert ClipLoss()(*student, output_dict=True)["contrastive_loss"] == ClipLoss()(*student)
    loss = TracerLoss(margin=0.05, smoothing=0.05, projection_orthogonal=0.1)
    projections = (torch.randn(24, 32), torch.randn(16, 32))
    terms = loss(*student, teacher=teacher, projections=projections, output_dict=True)
    assert all(name.endswith("_loss") for name in terms)
    total = loss(*student, teacher=teacher, projections=projections).loss
    torch.testing.assert_close(sum(terms.values()), total, rtol=1e-6, atol=0.0)


UNKNOWN = {
    "ClipLoss contrast": "it is always 'softmax'; SigLipLoss is 'sigmoid', and TracerLoss takes either",
    "SigLipLoss contrast": "it is always 'sigmoid'",
    "ClipLoss margin": "MPMNCELoss, TracerLoss and contrastive_loss take it",
    "SigLipLoss smoothing": "MPMNCELoss, TracerLoss and contrastive_loss take it",
    "SigLipLoss directions": "ClipLoss, MPMNCELoss, TracerLoss and contrastive_loss take it",
    "MPMNCELoss ignore_index": "TracerLoss and contrastive_loss take it",
    "ClipLoss relational": "TracerLoss and contrastive_loss take it",
    "ClipLoss distill_weight": "TracerLoss takes it",
    "ClipLoss group": "for several ranks pass rank and world_size; TracerLoss and contrastive_loss take a group",
    "TracerLoss world_size": r"for several ranks pass group=torch\.distributed\.group\.WORLD",
    "TracerLoss local_loss": "ClipLoss and MPMNCELoss take it",
    "SigLipLoss logit_bias": "pass it in each call of the loss",
    "TracerLoss teacher": "pass it in each call of the loss",
    "MPMNCELoss labels": "pass it in each call of the loss",
    "MPMNCELoss temperature": "its options are margin, smoothing, local_loss, .*, directions$",
}


@pytest.mark.parametrize(("given", "remedy"), UNKNOWN.items(), ids=UNKNOWN)
def test_an_unknown_option_is_answered_with_who_takes_it(given, remedy):
    """Regression: Python's own TypeError alone."""
    name, option = given.split()
    with pytest.raises(TypeError, match=f"^{name} has no option '{option}': {remedy}") as caught:
        getattr(losses, name)(**{option: 1})
    assert "\n" not in str(caught.value)


def test_a_subclass_has_options_of_its_own_and_losses_can_be_copied():
    class Named(ClipLoss):
        def __init__(self, *args, **options):
            self.title = options.pop("title")
            super().__init__(*args, **options)

    assert Named(title="mine", impl="eager").impl == "eager"
    for loss in (ClipLoss(directions=(1, 0)), MPMNCELoss(), SigLipLoss(), TracerLoss(margin=0.1)):
        assert vars(pickle.loads(pickle.dumps(loss))).keys() == vars(copy.deepcopy(loss)).keys()


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (ClipLoss, {"impl": "cuda"}, "unknown impl 'cuda'; choose one of auto"),
        (ClipLoss, {"directions": (0, 0)}, "directions must be two finite weights >= 0"),
        (ClipLoss, {"mesh": "star"}, r"mesh must be None, 'ring' or \(P, Q\) with P·Q = the number of ranks"),
        (ClipLoss, {"mesh": (2, 2), "world_size": 2}, r"mesh must be .* with P·Q = 2 ranks, got \(2, 2\)"),
        (MPMNCELoss, {"margin": -1}, "margin must be a finite number >= 0, got -1"),
        (MPMNCELoss, {"smoothing": 1}, r"smoothing must lie in \[0, 1\), got 1"),
        (SigLipLoss, {"impl": "cuda"}, "unknown impl 'cuda'"),
        (SigLipLoss, {"mesh": (0, 1)}, "mesh must be None, 'ring'"),
        (
            TracerLoss,
            {"group": "x"},
            r"group must be a torch.distributed.ProcessGroup or None, got 'x'; .*WORLD",
        ),
        (TracerLoss, {"mesh": 3}, "mesh must be None, 'ring'"),
        (TracerLoss, {"contrast": "hinge"}, "unknown contrast 'hinge'; choose one of softmax, sigmoid"),
        (TracerLoss, {"contrast": "sigmoid", "smoothing": 0.1}, "smoothing = 0.1 has no meaning"),
        (TracerLoss, {"teacher_temperature": 0}, "teacher_temperature must be a finite number > 0"),
        (TracerLoss, {"distill_weight": -1}, "weight distill_weight must be a finite number >= 0, got -1"),
        (TracerLoss, {"distill_weight": "high"}, "distill_weight must be a number, got 'high'"),
        (ClipLoss, {"rank": 2, "world_size": 2}, "rank must lie in .0, world_size., got rank = 2 of 2"),
        (SigLipLoss, {"rank": -1, "world_size": 2}, "rank must lie in .0, world_size., got rank = -1 of 2"),
        (TracerLoss, {"projection_orthogonal": -1}, "weight projection_orthogonal must be a finite number"),
        (TracerLoss, {"ignore_index": 0.5}, "ignore_index must be an integer or None, got 0.5"),
    ],
    ids=str,
)
def test_options_out_of_their_range_are_refused_when_a_loss_is_made(module, options, message):
    """Regression: only the first call told, in the name of contrastive_loss."""
    with pytest.raises(ValueError, match=f"^{module.__name__}: {message}") as caught:
        module(**options)
    assert "\n" not in str(caught.value)


def test_a_loss_may_be_made_on_ranks_outside_of_its_group():
    assert TracerLoss(group=dist.GroupMember.NON_GROUP_MEMBER).options["group"] is not None


@pytest.mark.parametrize("module", [ClipLoss, MPMNCELoss])
def test_what_is_refused(module, monkeypatch):
    monkeypatch.setattr(
        "tracer.losses.dist.is_initialized", lambda: False
    )  # other tests may have left a group
    with pytest.raises(ValueError, match=r"world_size = 2, but there is no process group: call torch\.distr"):
        module(world_size=2)(torch.eye(4), torch.eye(4), 1.0)
    with pytest.raises(ValueError, match="use_horovod is not supported"):
        module(world_size=2, use_horovod=True)


@pytest.mark.parametrize("module", [ClipLoss, MPMNCELoss])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_bias_of_the_logits_changes_no_softmax(module, shape):
    """As in open_clip's own training, which passes its models' bias; the loss and the gradients stay the same."""
    student, _ = pairs()
    u, v, scale = (torch.as_tensor(x).detach().clone().requires_grad_() for x in student)
    plain = module()(u, v, scale)
    bias = torch.full(shape, -10.0, requires_grad=True)
    biased = module()(u, v, scale, logit_bias=bias)
    assert torch.equal(plain, biased)
    assert module()(u, v, scale, -10.0, output_dict=True)["contrastive_loss"] == plain
    expected = torch.autograd.grad(plain, (u, v, scale))
    got = torch.autograd.grad(biased, (u, v, scale, bias))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=False))
    assert torch.equal(got[3], torch.zeros(shape))
    theirs = open_clip.loss.ClipLoss()(u, v, scale, logit_bias=bias)
    if module is ClipLoss:
        torch.testing.assert_close(biased, theirs)


def test_labels_make_more_positives():
    student, _ = pairs()
    labels = torch.arange(48) % 7
    expected = contrastive_loss(*student, labels=labels, impl="eager").loss
    torch.testing.assert_close(ClipLoss()(*student, labels=labels), expected)
    torch.testing.assert_close(ClipLoss()(*student, labels=torch.arange(48)), ClipLoss()(*student))


@pytest.mark.parametrize("impl", ["eager", "blocked"])
def test_mpm_nce_equals_the_published_form(impl):
    student, _ = pairs()
    labels = torch.arange(48) % 7
    theirs = published.mpm_nce_loss(*student, labels, margin=0.05, smoothing=0.05)
    loss = MPMNCELoss(impl=impl)(*student, labels=labels)
    assert_same_gradients(loss, theirs, student, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("impl", ["eager", "blocked"])
def test_tracer_equals_the_published_form(impl):
    """At its defaults, with two projections, against the terms computed one by one."""
    student, teacher = pairs()
    wv, wt = (torch.randn(rows, 32, dtype=torch.float32, requires_grad=True) for rows in (24, 16))
    output = TracerLoss(impl=impl)(*student, teacher=teacher, projections=(wv, wt))
    theirs = published.tracer_loss(
        *student, *teacher, relational=0.9, interactive=0.9, cross=0.9, feature=1800.0
    )
    penalty = 0.05 * (wv @ wt.T).square().sum().sqrt()
    leaves = [*student, wv, wt]
    assert_same_gradients(output.loss, theirs + penalty, leaves, rtol=1e-6, atol=1e-8)
    assert set(output.terms) == {*TERMS, "feature", "projection_product"}


def test_projection_penalties_by_hand():
    student, _ = pairs()
    wv, wt = 2 * torch.eye(4), torch.eye(4)
    loss = TracerLoss(distill_weight=0, projection_product=1.0, projection_orthogonal=1.0)
    output = loss(*student, projections=(wv, wt))
    assert output.terms["projection_product"] == pytest.approx(4.0)  # ‖2I‖ for 4 × 4
    assert output.terms["projection_orthogonal"] == pytest.approx(6.0)  # ‖4I − I‖
    assert output.loss.item() == pytest.approx(ClipLoss()(*student).item() + 10.0)


def test_tracer_without_teacher_is_the_contrastive_loss():
    student, _ = pairs()
    labels = torch.arange(48) % 7
    alone = {"distill_weight": 0, "projection_product": 0}
    output = TracerLoss(margin=0.1, smoothing=0.1, **alone)(*student, labels=labels)
    assert output.loss == contrastive_loss(*student, labels=labels, margin=0.1, smoothing=0.1).loss
    assert not any(output.terms[name] for name in ("relational", "interactive", "cross", "feature"))


def test_tracer_refuses_a_call_that_lacks_what_a_term_needs():
    """Regression: its terms were left out unnoticed."""
    student, teacher = pairs()
    matrices = torch.eye(32), torch.eye(32)
    with pytest.raises(
        ValueError, match=r"TracerLoss: relational, interactive, cross, feature need a teacher: pass teacher="
    ):
        TracerLoss()(*student, projections=matrices)
    with pytest.raises(ValueError, match=r"TracerLoss: cross needs a teacher: .*distill_weight=0"):
        TracerLoss(relational=0, interactive=0, feature=0)(*student, projections=matrices)
    with pytest.raises(
        ValueError, match=r"projection_product needs the projections: pass .*\(Wv, Wt\).*projection_product=0"
    ):
        TracerLoss()(*student, teacher=teacher)
    assert TracerLoss()(*student, teacher=teacher, projections=matrices).loss.isfinite()


@pytest.mark.parametrize(
    ("teacher", "got"),
    [(torch.tensor(-10.0), "a Tensor;"), ((1, 2), "a tuple of 2;"), ({}, "a dict;")],
    ids=str,
)
def test_what_is_not_a_teacher_is_named(teacher, got):
    """A SigLIP model returns its bias fourth, where the loss takes the teacher."""
    student, _ = pairs()
    with pytest.raises(ValueError, match=rf"TracerLoss: teacher must be .*\(image, text, .* got {got}"):
        TracerLoss(projection_product=0)(*student, teacher)


def test_tracer_stats_follow_the_request():
    student, teacher = pairs()
    loss = TracerLoss(projection_product=0)
    assert loss(*student, teacher=teacher).stats == {}
    stats = loss(*student, teacher=teacher, stats=True).stats
    assert "pair/image_to_text/kl" in stats
