"""Calls of ``tracer.ops.contrastive_loss`` for tests: problems, options, gradients, and their three runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter  # noqa: F401  makes the interpreter right, where there is no GPU
from three_runs import SLACK, assert_no_worse
from torch import Tensor

from tracer.kernels import _blocked_tile
from tracer.kernels.contrastive import Inputs, Needs
from tracer.ops import ContrastiveOutput, contrastive_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL_IMPLS = ("eager", "blocked", "triton")
WEIGHTS = {"relational": 1.0, "interactive": 0.7, "cross": 0.5, "feature": 20.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "clip": {},
    "mpm-nce": {"margin": 0.05, "smoothing": 0.05},
    "relational": {"relational": 1.0},
    "interactive": {"interactive": 1.0},
    "cross": {"cross": 1.0},
    "all": {**WEIGHTS, "margin": 0.05, "smoothing": 0.05, "teacher_temperature": 2.0},
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 × 8, so that a small problem has many, with ragged edges."""
    monkeypatch.setattr(_blocked_tile, "ROWS", 16)
    monkeypatch.setattr(_blocked_tile, "COLS", 8)


def problem(n, m, d=16, classes=5, scale=20.0, seed=0, dtype=torch.float64) -> dict[str, Any]:
    """Return the keyword arguments of a call on ``n`` images and ``m`` texts; ``classes=0`` for no labels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows):
        x = F.normalize(torch.randn(rows, d, generator=generator, dtype=torch.float64), dim=1)
        return x.to(dtype).to(DEVICE)

    labels = {}
    if classes:
        y = torch.randint(classes, (n,), generator=generator)
        y_text = torch.randint(classes, (m,), generator=generator)
        k = min(n, m)  # every label that occurs on one side occurs on the other
        y[:k], y_text[:k] = torch.arange(k) % classes, torch.arange(k) % classes
        y, y_text = y % min(k, classes), y_text % min(k, classes)
        labels = {"labels": y.to(DEVICE), "text_labels": y_text.to(DEVICE)}
    return {
        "image": draw(n),
        "text": draw(m),
        "logit_scale": torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE),
        **labels,
        "teacher_image": draw(n),
        "teacher_text": draw(m),
        "teacher_logit_scale": 1.1 * scale,
    }


def without_teacher(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call without the teacher's arguments."""
    return {name: value for name, value in kwargs.items() if not name.startswith("teacher")}


def inputs_of(kwargs: dict[str, Any]) -> Inputs:
    """Return the tensors of a call as an implementation takes them."""
    given = {name: value for name, value in kwargs.items() if name in Inputs._fields}
    if "teacher_logit_scale" in given:
        given["teacher_logit_scale"] = torch.full_like(given["logit_scale"], given["teacher_logit_scale"])
    return Inputs(**given)


def in_float64(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the same call on the same numbers in float64."""
    return {
        name: x.double() if isinstance(x, Tensor) and x.dtype.is_floating_point else x
        for name, x in kwargs.items()
    }


def loss_and_gradients(
    impl: str, kwargs: dict[str, Any], upstream: float = 1.0, term: str | None = None
) -> tuple[ContrastiveOutput, tuple[Tensor | None, ...]]:
    """Return a call's output and the gradients of its loss, or of one of its terms, times ``upstream``."""
    kwargs = dict(kwargs)
    leaves = [kwargs.pop(name).clone().requires_grad_() for name in Needs._fields]
    output = contrastive_loss(*leaves, impl=impl, **kwargs)
    value = output.loss if term is None else output.terms[term]
    return output, torch.autograd.grad(upstream * value, leaves, allow_unused=True)


def results(output: ContrastiveOutput, gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """Return everything that the three runs compare, by name."""
    named = dict(zip(Needs._fields, gradients, strict=True))
    given = {f"gradient of {name}": x for name, x in named.items() if x is not None}
    return {"loss": output.loss, **output.terms, **given}


def assert_right(
    impl: str, kwargs: dict[str, Any], slack: float | None = None, **how: Any
) -> tuple[ContrastiveOutput, ContrastiveOutput]:
    """Assert the rule of :mod:`three_runs` for loss, terms and gradients; return our output and the true one.

    The definition itself has nobody beside it: ``slack`` is then all that it may be off.
    """
    ours = loss_and_gradients(impl, kwargs, **how)
    truth = loss_and_gradients("eager", in_float64(kwargs), **how)
    by_torch = truth if impl == "eager" else loss_and_gradients("eager", kwargs, **how)
    slack = SLACK[kwargs["image"].dtype] if slack is None else slack
    assert_no_worse(results(*ours), results(*by_torch), results(*truth), slack)
    return ours[0], truth[0]
