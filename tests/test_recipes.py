"""The published numbers, each checked against the papers' own tables."""

from __future__ import annotations

from dataclasses import asdict

from tracer.recipes import EMA, R_ADAPTER, TRACER, WMA


def test_tracer_for_vit_b_16():
    """arXiv 2605.29380."""
    assert asdict(TRACER) == {
        "distill_weight": 0.9,
        "relational": 1,
        "feature": 2000,
        "interactive": 1,
        "cross": 1,
        "projection_product": 0.05,
        "projection_orthogonal": 0,
        "margin": 0,
        "smoothing": 0,
        "lr": 1e-5,
        "weight_decay": 0.1,
        "batch_size": 512,
        "warmup": 500,
    }
    assert asdict(WMA) == {"beta": 0.5, "every": 1}
    assert asdict(EMA) == {"start": 0.05, "end": 0.9, "warmup": 0.2, "every": 500}


def test_r_adapter_for_classification():
    """arXiv 2408.05749."""
    assert asdict(R_ADAPTER) == {
        "margin": 0.05,
        "smoothing": 0.05,
        "lr": 5e-4,
        "weight_decay": 0,
        "drop": 0.2,
        "momentum": 0.999,
        "alpha": 0.5,
    }
