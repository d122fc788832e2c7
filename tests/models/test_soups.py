"""Interpolated weights."""

from __future__ import annotations

import torch

from tracer.models.soups import interpolate


def test_interpolation_ends_at_both_models():
    start = {"w": torch.zeros(2), "n": torch.tensor(1)}
    end = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(5)}
    assert torch.equal(interpolate(start, end, 0.0)["w"], start["w"])
    assert torch.equal(interpolate(start, end, 1.0)["w"], end["w"])
    assert interpolate(start, end, 0.25)["w"].tolist() == [0.25, 0.5]
    assert interpolate(start, end, 0.25)["n"] == 5


def test_interpolation_is_computed_in_float32():
    """In bfloat16 itself 256 + (257 − 256) · 0.5 would round to 256, because 257 has no bfloat16."""
    start, end = (torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 260.0))
    half = interpolate({"w": start}, {"w": end}, 0.5)["w"]
    assert half.dtype == torch.bfloat16
    assert half.item() == 258.0
