"""The published step computes the same diagnostics and the same teacher as the package."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import published
from tracer.ops import contrastive_loss, sampled_diagnostics
from tracer.schedules import WMA
from tracer.teacher import build_teacher


def features(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(n, 16, generator=generator), dim=1) for _ in range(4)]


def test_published_diagnostics_are_ours():
    """Name by name, to the rounding of float32: they follow the same definitions."""
    u, v, tu, tv = features(40)
    values = published.diagnostics(u, v, torch.tensor(20.0), tu, tv, torch.tensor(30.0))
    ours = contrastive_loss(
        u, v, 20.0, teacher_image=tu, teacher_text=tv, teacher_logit_scale=30.0, impl="blocked", stats=True
    ).stats
    ours |= sampled_diagnostics(u, v, tu, tv, rows=40)
    assert ours.keys() == values.keys()
    for name, value in ours.items():
        assert values[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    assert values["student/image_to_text/entropy"] > 0.1
    assert 0 < values["top5_overlap"] < 1


def test_published_update_is_the_wma():
    torch.manual_seed(0)
    student = nn.Linear(3, 2)
    teacher, average = build_teacher(student, WMA(5)), nn.Linear(3, 2)
    average.load_state_dict(student.state_dict())
    for k in range(1, 6):
        with torch.no_grad():
            student.weight.add_(torch.randn(2, 3))
        teacher.update(k)
        published.update_teacher(average, student, teacher.schedule.weight(k))
    torch.testing.assert_close(average.weight, teacher.module.weight)
    assert not torch.equal(average.weight, student.weight)
