"""Measures of classification: what is kept of each picture's logits, and every number that is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

CALIBRATION_BINS = 15
PUBLISHED_BINS, PUBLISHED_BATCH = 10, 512  # of the published code's calibration error
PERFECT_DRAWS = 200  # of a perfectly calibrated model's answers
TOP = 5


@dataclass
class Predictions:
    """What is kept of the logits of N pictures, in the order of the set: 20 bytes a picture, whatever the classes.

    Attributes:
        truth: number of the class [N] int32.
        predicted: class with the largest logit, the first of several [N] int32.
        rank: classes that come before the true one: those of a larger logit, and of an equal one with a lower
            number [N] int32.
        confidence: largest probability [N] float32.
        nll: negative log-probability of the true class, in nats [N] float32.
    """

    truth: np.ndarray
    predicted: np.ndarray
    rank: np.ndarray
    confidence: np.ndarray
    nll: np.ndarray

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def correct(self) -> np.ndarray:
        """Whether each picture's class is the predicted one [N] bool."""
        return self.predicted == self.truth

    @classmethod
    def of(cls, logits: Tensor, truth: Tensor, contrast: str = "softmax") -> Predictions:
        """Return what is kept of logits [n, C] with their classes [n] int64.

        Their probabilities are the softmax over the classes; with ``contrast="sigmoid"`` those of each pair of
        picture and class by itself, which sum to anything.
        """
        logits = logits.float()
        own = logits.gather(1, truth[:, None])
        first = torch.arange(logits.shape[1], device=logits.device) < truth[:, None]
        rank = ((logits > own) | ((logits == own) & first)).sum(1)
        best, predicted = logits.max(1)
        if contrast == "sigmoid":
            confidence, nll = best.sigmoid(), F.softplus(-own[:, 0])
        else:
            total = logits.logsumexp(1)
            confidence, nll = (best - total).exp(), total - own[:, 0]
        values = (truth.int(), predicted.int(), rank.int(), confidence, nll)
        return cls(*(value.cpu().numpy() for value in values))

    @classmethod
    def joined(cls, parts: Iterable[Predictions]) -> Predictions:
        """Return several parts as one, in their order."""
        columns = zip(*([getattr(part, f.name) for f in fields(cls)] for part in parts), strict=True)
        return cls(*map(np.concatenate, columns))

    def save(self, path: str) -> None:
        """Write the columns as NumPy's archive."""
        np.savez_compressed(path, **vars(self))


def classification(predictions: Predictions, classes: int) -> dict[str, float]:
    """Return every measure of predictions among so many classes, each a fraction but ``nll``, in nats.

    ``accuracy`` and ``top5`` count pictures whose class has the largest logit, one of the five largest (with more
    than five classes). ``macro_f1`` is the mean F1 of the classes that occur in the truth, as WILDS and
    scikit-learn with ``labels=unique(truth)`` define it; torchmetrics' also counts classes that are predicted
    only.
    """
    p = predictions
    scores = {"accuracy": float(p.correct.mean()), "nll": float(p.nll.mean(dtype=np.float64))}
    if classes > TOP:
        scores["top5"] = float((p.rank < TOP).mean())
    return scores | {
        "macro_f1": macro_f1(p.truth, p.predicted),
        "ece": calibration_error(p.confidence, p.correct),
        "ece_perfect": perfect_calibration_error(p.confidence),
        "ece_published": published_calibration_error(p.confidence, p.correct),
    }


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean of 2·TP / (2·TP + FP + FN) over the classes that occur in the truth."""
    size = int(max(truth.max(), predicted.max())) + 1
    true = np.bincount(truth, minlength=size)
    both = true + np.bincount(predicted, minlength=size)  # 2·TP + FP + FN
    right = np.bincount(truth[truth == predicted], minlength=size)
    occurs = true > 0
    return float((2 * right[occurs] / both[occurs]).mean())


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Return the expected calibration error: Σ_b |b|/N · |accuracy(b) − mean confidence(b)|.

    The bins b divide the confidence into equal intervals [b/15, (b + 1)/15); the last one is closed, so that it
    holds a confidence of exactly 1 (Guo et al. 2017, arXiv 1706.04599).

    Args:
        confidence: largest probability of each picture [N].
        correct: whether the class of that probability is the true one [N] bool.
        bins: their number.
    """
    # torchmetrics 1.9 gives a confidence of exactly 1 a bin of its own: make it the float32 number next to 1.
    below_one = np.nextafter(np.float32(1), np.float32(0))
    confidences = torch.from_numpy(np.minimum(confidence.astype(np.float32), below_one))
    answers = torch.from_numpy(np.ascontiguousarray(correct)).int()
    return float(binary_calibration_error(confidences, answers, n_bins=bins))


def perfect_calibration_error(confidence: np.ndarray) -> float:
    """Return the calibration error to expect of a perfectly calibrated model with these confidences.

    It is above 0, since a bin of few pictures is not right exactly as often as it should be. The mean over
    :data:`PERFECT_DRAWS` draws, in which each picture is right with the probability of its confidence.
    """
    draw = np.random.default_rng(0)
    bins = bin_numbers(confidence, CALIBRATION_BINS)
    expected = np.bincount(bins, confidence, CALIBRATION_BINS)
    errors = []
    for _ in range(PERFECT_DRAWS):
        correct = draw.random(len(confidence), np.float32) < confidence
        errors.append(np.abs(np.bincount(bins, correct, CALIBRATION_BINS) - expected).sum() / len(confidence))
    return float(np.mean(errors))


def published_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Return the calibration error as the published code of FLYP's followers computes it.

    The published 0.047 and 0.072 are of this kind. It takes 10 bins, and the mean over batches of 512 pictures in
    the order of the files. A batch of ImageNet holds about ten classes then, and a perfectly calibrated model
    scores 0.03 to 0.04.
    """
    starts = range(0, len(confidence), PUBLISHED_BATCH)
    batches = [slice(start, start + PUBLISHED_BATCH) for start in starts]
    return float(np.mean([calibration_error(confidence[b], correct[b], PUBLISHED_BINS) for b in batches]))


def bin_numbers(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each confidence, as torchmetrics divides them: float32 edges, the lower one closed."""
    edges = torch.linspace(0, 1, bins + 1).numpy()
    return np.minimum(np.searchsorted(edges, confidence.astype(np.float32), side="right") - 1, bins - 1)


def worst_region(correct: np.ndarray, regions: Iterable[str]) -> tuple[str, float]:
    """Return the region of the lowest accuracy, and that accuracy; WILDS leaves the region "Other" out."""
    accuracies = {
        region: float(correct[rows].mean()) for region, rows in _rows_of(regions).items() if region != "Other"
    }
    worst = min(accuracies, key=accuracies.__getitem__)
    return worst, accuracies[worst]


def _rows_of(names: Iterable[str]) -> Mapping[str, np.ndarray]:
    """Return the rows of each name."""
    array = np.array(list(names))
    return {str(name): np.flatnonzero(array == name) for name in np.unique(array)}


def per_class(predictions: Predictions) -> dict[int, tuple[int, int]]:
    """Return pictures and correct predictions of each class that occurs."""
    truth = predictions.truth
    total, right = np.bincount(truth), np.bincount(truth[predictions.correct], minlength=int(truth.max()) + 1)
    return {int(n): (int(total[n]), int(right[n])) for n in np.flatnonzero(total)}


def reliability(predictions: Predictions) -> list[dict[str, float]]:
    """Return pictures, mean confidence and accuracy of each bin of the calibration error that holds any."""
    bins = bin_numbers(predictions.confidence, CALIBRATION_BINS)
    rows = []
    for n in np.unique(bins):
        inside = bins == n
        rows.append(
            {
                "pictures": int(inside.sum()),
                "confidence": float(predictions.confidence[inside].mean(dtype=np.float64)),
                "accuracy": float(predictions.correct[inside].mean()),
            }
        )
    return rows
