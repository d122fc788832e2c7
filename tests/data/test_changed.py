"""Mirroring and colours in both loaders, against torchvision's functions, and that they follow from the batch."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from picture_sets import LOADERS, levels
from torchvision.transforms import functional as F

from tracer.data.batches import TrainingBatches, Variation
from tracer.data.build import read_index
from tracer.data.changed import changed
from tracer.data.config import LoadingSettings
from tracer.data.order import changes

FACTORS = np.array([[1.2, 0.9, 1.1], [0.7, 1.3, 0.5], [1.0, 1.0, 1.0]], np.float32)


def test_colours_are_changed_as_torchvision_does():
    levels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    for n, (brightness, contrast, saturation) in enumerate(FACTORS.tolist()):
        got = torch.from_numpy(changed(levels[n], n == 0, FACTORS[n]) / 255)
        expected = torch.from_numpy(levels[n]) / 255
        expected = F.hflip(expected) if n == 0 else expected
        expected = F.adjust_brightness(expected, brightness)
        expected = F.adjust_contrast(expected, contrast)
        expected = F.adjust_saturation(expected, saturation)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_changes_follow_from_the_seed_and_the_batch():
    drawn, again, other, seed = (
        changes(400, *numbers, flip=True, jitter=0.3) for numbers in ((1, 2), (1, 2), (1, 3), (2, 2))
    )
    assert all((a == b).all() for a, b in zip(drawn, again, strict=True))
    assert (drawn.flipped != other.flipped).any()
    assert (drawn.factors != seed.factors).any()
    assert 0.4 < drawn.flipped.mean() < 0.6
    assert 0.7 <= drawn.factors.min() < 0.72
    assert 1.28 < drawn.factors.max() <= 1.3
    assert not changes(400, 1, 2, flip=False, jitter=0.3).flipped.any()
    assert changes(400, 1, 2, flip=True, jitter=0.0).factors is None


@pytest.mark.parametrize("loader", LOADERS)
def test_a_run_changes_its_pictures(drawings, clip, loader):
    """Half of them are mirrored; and the colours are those of the drawn factors, up to rounding."""
    index, wanted = read_index(drawings / "train.csv"), clip.picture_format
    options = {"batch_size": 16, "steps": 2, "seed": 3, "crop_scale": 0.9}
    options["loading"] = LoadingSettings(loader=loader)
    plain = list(TrainingBatches(index, clip, **options))
    flipped = list(TrainingBatches(index, clip, variation=Variation(0.9, flip=True), **options))
    for number, (a, b) in enumerate(zip(plain, flipped, strict=True)):
        turned = changes(16, 3, number, flip=True, jitter=0.0).flipped
        expected = torch.where(torch.from_numpy(turned)[:, None, None, None], a.image.flip(-1), a.image)
        assert torch.equal(b.image, expected)
    jittered = next(iter(TrainingBatches(index, clip, variation=Variation(0.9, color_jitter=0.4), **options)))
    drawn = changes(16, 3, 0, flip=False, jitter=0.4)
    before, after = (levels(batch.image, wanted) for batch in (plain[0], jittered))
    for image, got, factors in zip(before, after, drawn.factors, strict=True):
        expected = torch.from_numpy(changed(image.round().byte().numpy(), False, factors))
        assert (got - expected).abs().max() < 2
    assert (after - before).abs().mean((1, 2, 3)).min() > 1


def test_the_training_thread_changes_nothing(drawings, clip, monkeypatch):
    """It waits for the loader's threads, which change the pictures while it trains."""
    seen = set()

    def noted(*arguments):
        seen.add(threading.get_ident())
        return changed(*arguments)

    monkeypatch.setattr("tracer.data.threads.changed", noted)
    index = read_index(drawings / "train.csv")
    options = {"batch_size": 16, "steps": 2, "seed": 3, "crop_scale": 0.9}
    variation = Variation(0.9, flip=True, color_jitter=0.4)
    list(
        TrainingBatches(index, clip, variation=variation, loading=LoadingSettings(loader="torch"), **options)
    )
    assert seen
    assert threading.get_ident() not in seen
