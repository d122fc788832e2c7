"""Augmentation: pictures vary, keep their ink visible, and are never mirrored."""

from __future__ import annotations

import pytest
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from tracer.demo.augment import augment

S = 40  # the demo model's picture size


def glyphs(n: int, colour: tuple[int, int, int], left: bool = True) -> torch.Tensor:
    """Premultiplied RGBA [n, 4, S, S]: an opaque block in one half of the picture."""
    pictures = torch.zeros(n, 4, S, S, dtype=torch.uint8)
    columns = slice(6, 18) if left else slice(22, 34)
    pictures[:, :3, 12:28, columns] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    pictures[:, 3, 12:28, columns] = 255
    return pictures


def unnormalised(x: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(OPENAI_DATASET_MEAN), torch.tensor(OPENAI_DATASET_STD)
    return x * std[:, None, None] + mean[:, None, None]


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 40)], ids=["dark", "white", "red"])
def test_augmented_pictures_vary_stay_in_range_and_show_their_ink(colour):
    x = unnormalised(augment(glyphs(64, colour), torch.Generator().manual_seed(0)))
    assert x.shape == (64, 3, S, S)
    assert x.dtype == torch.float32
    assert x.min() >= -1e-5
    assert x.max() <= 1 + 1e-5
    assert x.flatten(1).unique(dim=0).shape[0] == 64
    assert (x.flatten(2).amax(2) - x.flatten(2).amin(2)).amax(1).min() > 0.2  # paper and ink differ, always


def test_augmentation_never_mirrors():
    both = torch.cat([glyphs(200, (0, 0, 0), left=True), glyphs(200, (0, 0, 0), left=False)])
    x = unnormalised(augment(both, torch.Generator().manual_seed(1))).mean(1)
    paper = x[:, :2, :2].mean((1, 2))
    ink = (x - paper[:, None, None]).abs()
    centre = (ink.sum(1) * torch.arange(S)).sum(1) / ink.sum((1, 2))
    assert (centre[:200] < S / 2).float().mean() > 0.9
    assert (centre[200:] > S / 2).float().mean() > 0.9


def test_augmentation_follows_its_generator():
    pictures = glyphs(4, (10, 90, 200))
    one, two, three = (augment(pictures, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
