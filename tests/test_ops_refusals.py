"""What ``tracer.ops.contrastive_loss`` refuses: one line that names the thing and the remedy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from loss_calls import DEVICE, problem, without_teacher

from tracer.kernels import _triton
from tracer.losses import ClipLoss
from tracer.ops import contrastive_loss

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
    "mesh": ({"mesh": "star"}, r"mesh must be None, 'ring' or \(P, Q\) with P·Q = the number of ranks, got"),
    "group": ({"group": "all"}, "group must be a torch.distributed.ProcessGroup or None, got 'all'; .*WORLD"),
    "triton float64": (
        {"impl": "triton"},
        "'triton' cannot take torch.float64 features; use impl blocked, eager",
    ),
    "triton's width": (
        {"impl": "triton", "image": torch.zeros(9, 12), "text": torch.zeros(9, 12)},
        "'triton' needs D to be a multiple of 8, got D = 12; use impl='blocked'",
    ),
    "contrast": ({"contrast": "hinge"}, "unknown contrast 'hinge'; choose one of softmax, sigmoid"),
    "a sigmoid's smoothing": (
        {"contrast": "sigmoid", "smoothing": 0.1},
        "smoothing = 0.1 has no meaning for contrast='sigmoid'.*use smoothing=0",
    ),
    "a sigmoid's directions": (
        {"contrast": "sigmoid", "directions": (1, 0)},
        r"directions = \(1, 0\) have no meaning for contrast='sigmoid'.*leave them out",
    ),
    "a bias of softmaxes": ({"logit_bias": -10.0}, "logit_bias changes no softmax; use contrast='sigmoid'"),
    "a teacher's bias of softmaxes": ({"teacher_logit_bias": 1.0}, "teacher_logit_bias changes no softmax"),
    "logit_bias": (
        {"contrast": "sigmoid", "logit_bias": torch.ones(3)},
        "logit_bias must hold one element",
    ),
    "directions of weight 0": ({"directions": (0, 0)}, r"two finite weights >= 0, .*, got \(0, 0\)"),
    "a negative direction": ({"directions": (1, -1)}, r"two finite weights >= 0, .*, got \(1, -1\)"),
    "directions nan": ({"directions": (math.nan, 1)}, "two finite weights >= 0"),
    "one direction": ({"directions": (1,)}, r"two finite weights >= 0, .*, got \(1,\)"),
    "a number for directions": ({"directions": 0.5}, "two finite weights >= 0, .*, got 0.5"),
    "ignore_index without labels": ({"ignore_index": -1}, "ignore_index needs labels; pass them"),
    "ignore_index": (
        {"ignore_index": 0.5, "labels": torch.zeros(9, dtype=torch.long)},
        "ignore_index must be an integer or None, got 0.5",
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


def test_triton_on_a_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    kwargs = {name: x.cpu().float() for name, x in without_teacher(problem(9, 9, classes=0)).items()}
    with pytest.raises(ValueError, match=r"'triton' needs a GPU.*use impl='blocked'"):
        contrastive_loss(**kwargs, impl="triton")


@pytest.mark.parametrize("kind", [list, tuple, np.asarray])
def test_labels_may_be_a_list_or_an_array(kind):
    kwargs = without_teacher(problem(9, 9, dtype=torch.float32, classes=3))
    want = contrastive_loss(**kwargs).loss
    numbers = kind(kwargs.pop("labels").tolist())
    assert torch.equal(contrastive_loss(**kwargs, labels=numbers).loss, want)
    loss = ClipLoss()(kwargs["image"], kwargs["text"], kwargs["logit_scale"], labels=numbers)
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("labels", [["cat"] * 9, [[1], [2, 3]]])
def test_labels_that_are_not_numbers_are_refused(labels):
    kwargs = without_teacher(problem(9, 9, classes=0))
    with pytest.raises(ValueError, match="labels must be integers, one per row, got a list that is not"):
        contrastive_loss(**kwargs | {"labels": labels})
