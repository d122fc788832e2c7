"""Data sets of picture files for the tests, and what the loaders make of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from tracer.data.build import collect
from tracer.data.config import LoadingSettings
from tracer.data.decoded import evaluation_plan
from tracer.data.index import Index
from tracer.data.loader import load
from tracer.data.order import Crops
from tracer.data.plan import Plan, Work
from tracer.data.sample import Sample
from tracer.models.picture_format import PictureFormat

CPU = torch.device("cpu")
LOADERS = ("torch", "dali")


def index_of(paths: Iterable[Path], label: str = "x") -> Index:
    """Return the index of files that nobody has looked at."""
    return collect("set", (Sample(str(path), label, (label,)) for path in paths))


def loaded(
    index: Index | list[Path],
    wanted: PictureFormat,
    loader: str,
    crops: Crops | None = None,
    batch_size: int | None = None,
    device: torch.device = CPU,
    **settings,
) -> torch.Tensor:
    """Return all pictures [n, 3, S, S] in order, on the CPU, as evaluation shows them or with these crops."""
    if isinstance(index, list):
        index = index_of(index)
    chosen = LoadingSettings(loader=loader, **settings)
    plan = evaluation_plan(index, wanted, batch_size or len(index), chosen, device)
    if crops is not None:
        work = Work(0, np.arange(len(index)), crops)
        plan = Plan(index, wanted, chosen, lambda _: work, range(1), len(index))
    images, rows = zip(*load(plan), strict=True)
    assert torch.cat(rows).tolist() == list(range(len(index)))
    return torch.cat(images).cpu()


def levels(image: torch.Tensor, wanted: PictureFormat) -> torch.Tensor:
    """Return normalised pictures [..., 3, S, S] as levels from 0 to 255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (wanted.mean, wanted.std))
    return 255 * (image * std + mean)
