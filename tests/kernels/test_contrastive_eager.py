"""The definition (kernels/contrastive_eager.py) against loops over numbers, and values made by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tracer.kernels import contrastive_eager
from tracer.kernels.contrastive import Inputs, Options, Statistics, diagnostic_names

ALL_TERMS = Options(relational=True, interactive=True, cross=True)


def terms_of(inputs, options=Options()):  # noqa: B008
    return contrastive_eager.contrastive_terms(inputs, options)[0]


def features(n, m, d=8, seed=0):
    """Student and teacher features, [n, d], [m, d], [n, d], [m, d]: normalised, float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda rows: F.normalize(torch.randn(rows, d, generator=generator, dtype=torch.float64), dim=1)  # noqa: E731
    return draw(n), draw(m), draw(n), draw(m)


def softmax(logits):
    top = max(logits)
    total = sum(math.exp(x - top) for x in logits)
    return [math.exp(x - top) / total for x in logits]


def naive_terms(u, v, sigma, y, y_text, tu, tv, teacher_sigma, margin, smoothing):
    """The four terms, number by number, as design and papers define them."""
    n, m = len(u), len(v)
    dot = lambda a, b: sum(float(x) * float(w) for x, w in zip(a, b, strict=True))  # noqa: E731
    positive = [[int(y[i]) == int(y_text[j]) for j in range(m)] for i in range(n)]
    z = [[sigma * (dot(u[i], v[j]) + margin * (not positive[i][j])) for j in range(m)] for i in range(n)]
    s = [[sigma * dot(u[i], v[j]) for j in range(m)] for i in range(n)]
    t = [[teacher_sigma * dot(tu[i], tv[j]) for j in range(m)] for i in range(n)]
    a = [[sigma * dot(u[i], tv[j]) for j in range(m)] for i in range(n)]
    b = [[sigma * dot(tu[i], v[j]) for j in range(m)] for i in range(n)]
    turned = lambda matrix: [list(column) for column in zip(*matrix, strict=True)]  # noqa: E731

    def target(row, eps):
        count = sum(row)
        if count == len(row):
            return [1 / count] * count
        return [(1 - eps) / count if is_positive else eps / (len(row) - count) for is_positive in row]

    def cross_entropy(positives, logits, eps):
        rows = zip(positives, logits, strict=True)
        return sum(
            -sum(q * math.log(p) for q, p in zip(target(is_positive, eps), softmax(row), strict=True) if q)
            for is_positive, row in rows
        ) / len(logits)

    def kl(teacher, student):
        total = 0.0
        for x, w in zip(teacher, student, strict=True):
            total += sum(p * (math.log(p) - math.log(q)) for p, q in zip(softmax(x), softmax(w), strict=True))
        return total / len(teacher)

    tp = turned(positive)
    return [
        0.5 * (cross_entropy(positive, z, smoothing) + cross_entropy(tp, turned(z), smoothing)),
        0.5 * (kl(t, s) + kl(turned(t), turned(s))),
        0.5 * (cross_entropy(positive, a, 0.0) + cross_entropy(tp, turned(b), 0.0)),
        0.5 * (kl(t, a) + kl(turned(t), turned(b))),
    ]


@pytest.mark.parametrize(
    ("n", "m", "classes"),
    [
        (6, 9, 3),  # several positives in every row and column, N < M
        (9, 6, 3),  # N > M
        (5, 5, 5),  # one positive each
        (4, 7, 1),  # one class: no negatives anywhere
        (1, 1, 1),  # a single pair
    ],
)
@pytest.mark.parametrize(("margin", "smoothing"), [(0.0, 0.0), (0.05, 0.05), (0.3, 0.0), (0.0, 0.2)])
def test_terms_equal_the_loops(n, m, classes, margin, smoothing):
    u, v, tu, tv = features(n, m)
    y, y_text = torch.arange(n) % classes, torch.arange(m) % classes
    sigma, teacher_sigma = torch.tensor(7.0, dtype=torch.float64), torch.tensor(9.0, dtype=torch.float64)
    inputs = Inputs(u, v, sigma, tu, tv, teacher_sigma, y, y_text)
    terms = terms_of(inputs, ALL_TERMS._replace(margin=margin, smoothing=smoothing, teacher_temperature=1.5))
    expected = naive_terms(u, v, 7.0, y, y_text, tu, tv, 9.0 / 1.5, margin, smoothing)
    torch.testing.assert_close(terms, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_clip_loss_by_hand():
    """Two orthogonal pairs at scale log 3: each softmax is (3, 1)/4, so the loss is log 4/3."""
    eye = torch.eye(2, dtype=torch.float64)
    terms = terms_of(Inputs(eye, eye, torch.tensor(math.log(3.0), dtype=torch.float64)))
    assert terms[0].item() == pytest.approx(math.log(4 / 3), abs=1e-15)


def test_margin_and_smoothing_by_hand():
    """z = σ(0 + δ) on the negative: with σδ = σ both logits are equal; the smoothed target changes nothing."""
    eye = torch.eye(2, dtype=torch.float64)
    y = torch.arange(2)
    sigma = torch.tensor(5.0, dtype=torch.float64)
    for smoothing in (0.0, 0.3):
        terms = terms_of(
            Inputs(eye, eye, sigma, labels=y, text_labels=y), Options(margin=1.0, smoothing=smoothing)
        )
        assert terms[0].item() == pytest.approx(math.log(2), abs=1e-15)


def test_divergence_by_hand():
    """Student uniform (σ = 0), teacher (3, 1)/4: KL = ¾ log 3/2 + ¼ log ½; XKD is the same."""
    eye = torch.eye(2, dtype=torch.float64)
    y, zero = torch.arange(2), torch.zeros((), dtype=torch.float64)
    log3 = torch.tensor(math.log(3.0), dtype=torch.float64)
    terms = terms_of(Inputs(eye, eye, zero, eye, eye, log3, y, y), ALL_TERMS)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert terms.tolist() == pytest.approx([math.log(2), kl, math.log(2), kl], abs=1e-15)


def test_identical_teacher_costs_nothing():
    u, v, _, _ = features(6, 6)
    sigma, y = torch.tensor(9.0, dtype=torch.float64), torch.arange(6)
    terms = terms_of(Inputs(u, v, sigma, u, v, sigma, y, y), ALL_TERMS)
    assert abs(terms[1]) < 1e-14
    assert abs(terms[3]) < 1e-14
    assert terms[2] == terms[0]


@pytest.mark.parametrize(
    ("enabled", "products"),
    [
        ({}, 2),  # s and, for the diagnostics, t
        ({"relational": True}, 2),
        ({"interactive": True}, 4),  # a and b as well
        ({"cross": True}, 4),
    ],
)
def test_only_needed_products_are_taken(enabled, products):
    u, v, tu, tv = features(6, 9)
    sigma, y, y_text = torch.tensor(3.0, dtype=torch.float64), torch.arange(6) % 3, torch.arange(9) % 3
    with FlopCounterMode(display=False) as counter:
        terms_of(Inputs(u, v, sigma, tu, tv, sigma, y, y_text), Options(**enabled))
    assert counter.get_total_flops() == products * 2 * 6 * 9 * 8


def test_gradients_of_the_definition():
    u, v, tu, tv = features(5, 4, d=3)
    y, y_text = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([2, 1, 0, 1])
    sigma, teacher_sigma = torch.tensor(3.0, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)

    def terms(u, v, sigma):
        inputs = Inputs(u, v, sigma, tu, tv, teacher_sigma, y, y_text)
        return terms_of(inputs, ALL_TERMS._replace(margin=0.1, smoothing=0.1))

    leaves = [x.clone().requires_grad_() for x in (u, v, sigma)]
    assert torch.autograd.gradcheck(terms, leaves)
    assert torch.autograd.gradgradcheck(terms, leaves)


def test_row_without_positive_has_no_loss():
    u, v, _, _ = features(3, 3)
    sigma = torch.tensor(2.0, dtype=torch.float64)
    terms = terms_of(Inputs(u, v, sigma, labels=torch.tensor([0, 1, 5]), text_labels=torch.tensor([0, 1, 1])))
    assert terms[0].isnan()


def test_diagnostics_by_hand():
    """Two pairs at scale log 3, teacher with its texts swapped: sure of the wrong text."""
    eye = torch.eye(2, dtype=torch.float64)
    y, log3 = torch.arange(2), torch.tensor(math.log(3.0), dtype=torch.float64)
    inputs = Inputs(eye, eye, log3, eye, eye.flip(0), log3, y, y)
    _, measured = contrastive_eager.contrastive_terms(inputs, Options(stats=True))
    named = dict(zip(diagnostic_names(True), measured.tolist(), strict=True))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    for direction in ("image_to_text", "text_to_image"):
        for model, probability, right in (("student", 0.75, 1.0), ("teacher", 0.25, 0.0)):
            assert named[f"{model}/{direction}/entropy"] == pytest.approx(entropy)
            assert named[f"{model}/{direction}/confidence"] == pytest.approx(0.75)
            assert named[f"{model}/{direction}/positive_probability"] == pytest.approx(probability)
            assert named[f"{model}/{direction}/accuracy"] == right
        assert named[f"pair/{direction}/agreement"] == 0.0
        assert named[f"pair/{direction}/kl"] == pytest.approx(0.5 * math.log(3))


def test_derived_diagnostics_by_hand():
    measured = {
        f"{model}/{direction}/{name}": torch.tensor(value)
        for model, accuracy in (("student", 0.5), ("teacher", 0.75))
        for direction in ("image_to_text", "text_to_image")
        for name, value in (("entropy", 2.0), ("accuracy", accuracy))
    }
    derived = contrastive_eager.derived_diagnostics(measured, N=4, M=16)
    assert derived["student/image_to_text/effective_temperature"] == pytest.approx(math.log(16) / 2)
    assert derived["teacher/text_to_image/effective_temperature"] == pytest.approx(math.log(4) / 2)
    assert derived["pair/image_to_text/accuracy_difference"] == -0.25
    student = {name: value for name, value in measured.items() if name.startswith("student")}
    assert all(
        name.startswith("student") for name in contrastive_eager.derived_diagnostics(student, N=4, M=16)
    )


def test_feature_distance_by_hand():
    """The mean over all entries, in float32 for narrower features, and differentiable towards the student."""
    student = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)
    distance = contrastive_eager.feature_distance(student, torch.full((2, 4), 3.0), 2)
    assert distance == 9.0
    assert distance.dtype == torch.float32
    (gradient,) = torch.autograd.grad(distance, student)
    assert (gradient == -2 * 3.0 / 8).all()


def test_saved_statistics_by_hand():
    """Two orthogonal pairs at scale log 3: Σ e^s = 4 in every row and column, so log2 4 = 2."""
    eye, log3 = torch.eye(2, dtype=torch.float64), torch.tensor(math.log(3.0), dtype=torch.float64)
    for stats in contrastive_eager.statistics(Inputs(eye, eye, log3), Options()):
        named = Statistics(*stats)
        assert named.lse_z.tolist() == pytest.approx([2.0, 2.0])
        assert named.lse_s.tolist() == pytest.approx([2.0, 2.0])
        assert named.positives.tolist() == [1, 1]
        assert named.lse_t.isnan().all()
