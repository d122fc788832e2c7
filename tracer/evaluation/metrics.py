"""Accuracy and calibration of predicted probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

CALIBRATION_BINS = 15


def accuracy(probabilities: Tensor, truth: Tensor) -> float:
    """Return the top-1 accuracy, in [0, 1].

    Args:
        probabilities: [N, C], each row sums to 1.
        truth: class numbers [N] int64.
    """
    return float(multiclass_accuracy(probabilities, truth, probabilities.shape[1], average="micro"))


def calibration_error(probabilities: Tensor, truth: Tensor) -> float:
    """Return the expected calibration error, in [0, 1]: Σ_b |b|/N · |accuracy(b) − mean confidence(b)|.

    The bins b divide the confidence, the largest probability of a row, into ``CALIBRATION_BINS`` equal intervals
    [b/15, (b + 1)/15); the last one is closed, so that it holds a confidence of exactly 1 (Guo et al. 2017,
    arXiv 1706.04599).

    Args:
        probabilities: [N, C], each row sums to 1.
        truth: class numbers [N] int64.
    """
    classes = probabilities.shape[1]
    # torchmetrics 1.9 gives a confidence of exactly 1 a bin of its own: make it the float32 number next to 1.
    below_one = torch.nextafter(torch.ones(()), torch.zeros(()))
    probabilities = probabilities.float().clamp(max=below_one.item())
    return float(multiclass_calibration_error(probabilities, truth, classes, n_bins=CALIBRATION_BINS))
