"""Mirroring and colours against torchvision's functions, and that they follow from seed and batch."""

from __future__ import annotations

import numpy as np
import torch
from picture_sets import levels
from torchvision.transforms import functional as F

from tracer.data.batches import TrainingBatches, Variation
from tracer.data.build import read_index
from tracer.data.changed import change
from tracer.data.order import Changes, changes

FACTORS = np.array([[1.2, 0.9, 1.1], [0.7, 1.3, 0.5], [1.0, 1.0, 1.0]], np.float32)


def test_colours_are_changed_as_torchvision_does(clip):
    wanted = clip.picture_format
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (wanted.mean, wanted.std))
    image = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    drawn = Changes(np.array([True, False, False]), FACTORS)
    got = change((image - mean) / std, drawn, wanted, flip=True, jitter=True) * std + mean
    for n, (brightness, contrast, saturation) in enumerate(FACTORS.tolist()):
        expected = F.hflip(image[n]) if n == 0 else image[n]
        expected = F.adjust_brightness(expected, brightness)
        expected = F.adjust_contrast(expected, contrast)
        expected = F.adjust_saturation(expected, saturation)
        torch.testing.assert_close(got[n], expected, rtol=0, atol=1e-4)


def test_changes_follow_from_the_seed_and_the_batch():
    drawn = changes(400, 1, 2, 0.3)
    again, other, seed = changes(400, 1, 2, 0.3), changes(400, 1, 3, 0.3), changes(400, 2, 2, 0.3)
    assert all((a == b).all() for a, b in zip(drawn, again, strict=True))
    assert (drawn.flipped != other.flipped).any()
    assert (drawn.factors != seed.factors).any()
    assert 0.4 < drawn.flipped.mean() < 0.6
    assert 0.7 <= drawn.factors.min() < 0.72
    assert 1.28 < drawn.factors.max() <= 1.3


def test_a_run_mirrors_half_of_its_pictures(drawings, clip):
    index = read_index(drawings / "train.csv")
    options = {"batch_size": 16, "steps": 2, "seed": 3, "crop_scale": 0.9}
    plain = list(TrainingBatches(index, clip, **options))
    flipped = list(TrainingBatches(index, clip, variation=Variation(0.9, flip=True), **options))
    for number, (a, b) in enumerate(zip(plain, flipped, strict=True)):
        turned = changes(16, 3, number, 0.0).flipped
        expected = torch.where(torch.from_numpy(turned)[:, None, None, None], a.image.flip(-1), a.image)
        assert torch.equal(b.image, expected)
    jittered = next(iter(TrainingBatches(index, clip, variation=Variation(0.9, color_jitter=0.4), **options)))
    moved = levels(jittered.image, clip.picture_format) - levels(plain[0].image, clip.picture_format)
    assert moved.abs().mean((1, 2, 3)).min() > 1
