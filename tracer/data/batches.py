"""Batches of a training run: pictures, tokens and labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tracer.data.dali import Pictures
from tracer.data.index import Index
from tracer.data.order import CAPTIONS, random_crops, shuffled
from tracer.errors import UserError
from tracer.models.clip import Clip


@dataclass
class Batch:
    """``image`` [n, 3, S, S] float32, ``text`` [n, context], ``label`` [n], ``index`` [n], all int64."""

    image: Tensor
    text: Tensor
    label: Tensor
    index: Tensor


class TrainingBatches:
    """Batches ``first``, … ``steps`` − 1 of a run: pictures, a caption of each drawn at random, integer labels.

    Pictures are random crops of at least ``crop_scale`` of their area. What comes before ``first`` is not read.
    """

    def __init__(
        self,
        index: Index,
        clip: Clip,
        *,
        batch_size: int,
        steps: int,
        seed: int,
        crop_scale: float,
        first: int = 0,
        workers: int = 2,
        device: torch.device | str = "cpu",
    ):
        if len(index) < batch_size:
            raise UserError(
                f"'{index.name}' holds {len(index)} pictures, fewer than one batch of {batch_size}: "
                "lower --batch_size or add pictures"
            )
        self.numbers, self.seed, self.device = range(first, steps), seed, torch.device(device)
        order = shuffled(len(index), batch_size, steps, seed, first)
        crops = (random_crops(batch_size, seed, batch, crop_scale) for batch in self.numbers)
        # With nothing left to read there is no pipeline: it would ask for a batch at once.
        self.pictures: Iterable[tuple[Tensor, Tensor]] = (
            Pictures(index, clip, order, batch_size, crops=crops, workers=workers, device=device)
            if self.numbers
            else ()
        )
        number = {name: i for i, name in enumerate(index.classes)}
        self.labels = torch.tensor([number[label] for label in index.labels])
        self.first = torch.tensor(np.cumsum([0] + [len(c) for c in index.captions]))
        self.tokens = clip.tokenizer([c for captions in index.captions for c in captions])

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Batch]:
        for number, (image, index) in zip(self.numbers, self.pictures, strict=True):
            start, count = self.first[index], self.first[index + 1] - self.first[index]
            chance = np.random.default_rng((self.seed, number, CAPTIONS)).random(len(index))
            row = start + (torch.from_numpy(chance) * count).long()
            text, label = self.tokens[row], self.labels[index]
            yield Batch(image, text.to(self.device), label.to(self.device), index)
