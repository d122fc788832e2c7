"""Diagnostics by name: every implementation against the definition in float64, ties, and sampled ones."""

from __future__ import annotations

import math

import pytest
import torch
from loss_calls import ALL_IMPLS, DEVICE, in_float64, problem, small_tiles, without_teacher  # noqa: F401

from tracer.kernels.contrastive import diagnostic_names
from tracer.ops import contrastive_loss, sampled_diagnostics

# numpy, in the interpreter, warns of lanes that a mask throws away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("has_teacher", [True, False])
def test_stats(impl, has_teacher):
    kwargs = problem(33, 45, dtype=torch.float32) | {"stats": True, "margin": 0.05}
    kwargs = kwargs if has_teacher else without_teacher(kwargs)
    stats = contrastive_loss(**kwargs, impl=impl).stats
    expected = contrastive_loss(**in_float64(kwargs), impl="eager").stats
    assert set(stats) == set(expected) >= set(diagnostic_names(has_teacher))
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
    with pytest.raises(ValueError, match="sampled_diagnostics: image has D"):
        sampled_diagnostics(eye, eye[:, :1], eye, eye)
