"""Measures of classification against plain numpy and, where its definition agrees, torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as torchmetrics

from tracer.evaluation.metrics import (
    CALIBRATION_BINS,
    Predictions,
    calibration_error,
    classification,
    macro_f1,
    perfect_calibration_error,
    published_calibration_error,
    reliability,
    worst_region,
)


def drawn(pictures=1200, classes=7, seed=0):
    """Logits of a model that is right for about half of the pictures, in the order of the classes."""
    generator = np.random.default_rng(seed)
    truth = np.sort(generator.integers(0, classes, pictures))
    logits = generator.normal(0, 2, (pictures, classes)).astype(np.float32)
    logits[np.arange(pictures), truth] += 2
    return torch.from_numpy(logits), torch.from_numpy(truth)


def in_numpy(p, truth, bins, rows=slice(None)):
    """The calibration error, from probabilities."""
    confidence, correct = p.max(1)[rows], (p.argmax(1) == truth)[rows]
    error = 0.0
    for b in range(bins):
        inside = (confidence >= b / bins) & (confidence < (b + 1) / bins)
        if b == bins - 1:
            inside |= confidence == 1
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return error


def test_every_measure_is_what_numpy_says():
    logits, truth = drawn()
    parts = [Predictions.of(x, y) for x, y in zip(logits.split(100), truth.split(100), strict=True)]
    scores = classification(Predictions.joined(parts), 7)
    x, y = logits.double().numpy(), truth.numpy()
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    order = np.argsort(-p, axis=1, kind="stable")
    f1 = []
    for c in range(7):
        tp = ((p.argmax(1) == c) & (y == c)).sum()
        precision, recall = tp / (p.argmax(1) == c).sum(), tp / (y == c).sum()
        f1.append(2 * precision * recall / (precision + recall))
    batches = [slice(start, start + 512) for start in (0, 512, 1024)]
    assert scores == {
        "accuracy": pytest.approx((p.argmax(1) == y).mean()),
        "top5": pytest.approx((order[:, :5] == y[:, None]).any(1).mean()),
        "nll": pytest.approx(-np.log(p[np.arange(len(y)), y]).mean(), rel=1e-6),
        "macro_f1": pytest.approx(np.mean(f1)),
        "ece": pytest.approx(in_numpy(p, y, 15), abs=1e-6),
        "ece_perfect": pytest.approx(perfect_calibration_error(p.max(1)), abs=1e-4),
        "ece_published": pytest.approx(np.mean([in_numpy(p, y, 10, b) for b in batches]), abs=1e-6),
    }


def test_torchmetrics_agrees_where_its_definition_is_the_same():
    logits, truth = drawn(seed=1)
    scores = classification(Predictions.of(logits, truth), 7)
    options = {"preds": logits.softmax(1), "target": truth, "num_classes": 7}
    assert scores["accuracy"] == pytest.approx(
        float(torchmetrics.multiclass_accuracy(**options, average="micro"))
    )
    top5 = torchmetrics.multiclass_accuracy(**options, average="micro", top_k=5)
    assert scores["top5"] == pytest.approx(float(top5))
    f1 = torchmetrics.multiclass_f1_score(**options, average="macro")  # all classes occur in the truth
    assert scores["macro_f1"] == pytest.approx(float(f1))
    ece = torchmetrics.multiclass_calibration_error(**options, n_bins=CALIBRATION_BINS)  # none is exactly 1
    assert scores["ece"] == pytest.approx(float(ece), abs=1e-6)


def test_macro_f1_counts_classes_of_the_truth_alone():
    """WILDS' number on five rows; torchmetrics also counts class 2, which is predicted only, as 0."""
    truth, predicted = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 2, 1, 1])
    assert macro_f1(truth, predicted) == pytest.approx((0.8 + 1.0) / 2)
    everywhere = torchmetrics.multiclass_f1_score(
        torch.from_numpy(predicted), torch.from_numpy(truth), 3, average="macro"
    )
    assert float(everywhere) == pytest.approx((0.8 + 1.0 + 0.0) / 3)


def test_full_confidence_belongs_to_the_last_bin():
    """Ten pictures at 1.0, five of them right, and ten at 0.937, all right, share the bin from 14/15 to 1."""
    confidence, correct = np.array([1.0] * 10 + [0.937] * 10), np.array([True, False] * 5 + [True] * 10)
    for dtype in (np.float32, np.float64):
        assert calibration_error(confidence.astype(dtype), correct) == pytest.approx(0.2185, abs=1e-6)
    assert calibration_error(np.ones(2), np.array([True, True])) == pytest.approx(0, abs=1e-6)
    assert calibration_error(np.ones(2), np.array([False, False])) == pytest.approx(1, abs=1e-6)
    own = reliability(
        Predictions(*np.array([[0, 1], [0, 0], [0, 1]], np.int32), *np.ones((2, 2), np.float32))
    )
    assert own == [{"pictures": 2, "confidence": 1.0, "accuracy": 0.5}]


def test_a_confidence_between_two_bins_belongs_to_the_upper_one():
    confidence, correct = np.array([0.6, 0.6, 0.62]), np.array([True, True, False])  # 9/15 is the border
    expected = abs(2 / 3 - (0.6 + 0.6 + 0.62) / 3)
    assert calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-6)


def test_a_perfect_model_is_not_at_zero():
    """On 176 pictures (the demo's set square) about 0.09; by the published definition 0.03 to 0.04 on 50,000."""
    generator = np.random.default_rng(0)
    few = generator.beta(2, 2, 176)
    assert perfect_calibration_error(few) == pytest.approx(0.09, abs=0.015)
    many = generator.beta(5, 1, 50_000)
    correct = generator.random(50_000) < many
    assert perfect_calibration_error(many) == pytest.approx(0.004, abs=0.002)
    assert calibration_error(many, correct) == pytest.approx(0.004, abs=0.003)
    assert published_calibration_error(many, correct) == pytest.approx(0.035, abs=0.005)


def test_equal_logits_are_in_the_order_of_the_classes():
    kept = Predictions.of(torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0]]), torch.tensor([1, 2]))
    assert kept.rank.tolist() == [1, 1]
    assert kept.predicted.tolist() == [0, 1]


def test_the_worst_region_leaves_out_other():
    correct = np.array([True, True, False, True, False, False])
    regions = ["Asia", "Asia", "Africa", "Africa", "Other", "Other"]
    assert worst_region(correct, regions) == ("Africa", 0.5)
