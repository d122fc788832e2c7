"""Accuracy and calibration against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tracer.evaluation.metrics import CALIBRATION_BINS, accuracy, calibration_error


def test_metrics_are_what_numpy_says():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (500, 7))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = np.where(generator.random(500) < 0.6, p.argmax(1), generator.integers(0, 7, 500))
    confidence, correct = p.max(1), p.argmax(1) == truth
    expected = 0.0
    for b in range(CALIBRATION_BINS):
        inside = (confidence >= b / CALIBRATION_BINS) & (confidence < (b + 1) / CALIBRATION_BINS)
        if b == CALIBRATION_BINS - 1:
            inside |= confidence == 1
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    got = torch.from_numpy(p).float(), torch.from_numpy(truth)
    assert accuracy(*got) == pytest.approx(correct.mean())
    assert calibration_error(*got) == pytest.approx(expected, abs=1e-6)


def test_full_confidence_belongs_to_the_last_bin():
    """Ten pictures at 1.0, five of them right, and ten at 0.937, all right, share the bin from 14/15 to 1."""
    p = torch.tensor([[1.0, 0.0]] * 10 + [[0.937, 0.063]] * 10)
    truth = torch.tensor([0, 1] * 5 + [0] * 10)
    for dtype in (torch.float32, torch.float64):
        assert calibration_error(p.to(dtype), truth) == pytest.approx(0.2185, abs=1e-6)
    assert calibration_error(torch.eye(2), torch.tensor([0, 1])) == pytest.approx(0, abs=1e-6)
    assert calibration_error(torch.eye(2), torch.tensor([1, 0])) == pytest.approx(1, abs=1e-6)


def test_a_confidence_between_two_bins_belongs_to_the_upper_one():
    p = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.62, 0.38]])  # 9/15 is the border
    expected = abs(2 / 3 - (0.6 + 0.6 + 0.62) / 3)
    assert calibration_error(p, torch.tensor([0, 0, 1])) == pytest.approx(expected, abs=1e-6)


def test_classes_that_do_not_occur_do_not_count():
    p = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1]])
    assert accuracy(p, torch.tensor([0, 1])) == 0.5
    assert calibration_error(p, torch.tensor([0, 1])) == pytest.approx((0.2 + 0.6) / 2)
