"""Batches of a training run: pictures, tokens and labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tracer.data.dali import Pictures
from tracer.data.index import Index
from tracer.data.order import caption_choice, random_crops, shuffled
from tracer.errors import UserError
from tracer.models.clip import Clip


@dataclass
class Batch:
    """n pictures, each with one of its captions and its label.

    Attributes:
        image: normalised pictures [n, 3, S, S] float32.
        text: tokens of the captions [n, context] int64.
        label: numbers of the classes [n] int64; a picture without a label has a number of its own.
        index: numbers of the pictures in the data set [n] int64, on the CPU.
    """

    image: Tensor
    text: Tensor
    label: Tensor
    index: Tensor


class TrainingBatches:
    """Iterate over the batches ``first``, …, ``steps`` − 1 of a run; those before ``first`` are not read.

    Args:
        index: the data set; a label's number is its place in ``index.classes``. A picture without a label gets
            the next free number, shared only by other rows of the same file, so that in the loss its captions
            are its only positives.
        clip: the model that gives the tokenizer and the picture format.
        batch_size: pictures of a batch, on all ranks together. Their order, crops and captions do not depend on
            the number of ranks; each rank reads and yields an equal slice of every batch.
        steps: number of batches of the whole run.
        seed: of the order, the crops and the choice of captions.
        crop_scale: smallest share of a picture's area that a random crop keeps.
        first: number of the first batch.
        workers: threads that decode pictures.
        device: where the batches are put.
        rank, world_size: the slice that is yielded: the ``rank``-th of ``world_size`` equal ones.

    Raises:
        ValueError: the slices would not be equal.
        UserError: the data set has fewer pictures than one batch.
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
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size % world_size:
            raise ValueError(f"batch_size is {batch_size}: it must be divisible by world_size {world_size}")
        if len(index) < batch_size:
            raise UserError(
                f"'{index.name}' holds {len(index)} pictures, fewer than one batch of {batch_size}: "
                "lower --batch_size or add pictures"
            )
        self._numbers, self._seed, self._device = range(first, steps), seed, torch.device(device)
        mine = batch_size // world_size
        self._batch_size, self._mine = batch_size, slice(rank * mine, (rank + 1) * mine)
        order = (rows[self._mine] for rows in shuffled(len(index), batch_size, steps, seed, first))
        crops = (random_crops(batch_size, seed, n, crop_scale).of(self._mine) for n in self._numbers)
        # A pipeline asks for its first batch at once; with none left to read there must be no pipeline.
        self._pictures: Iterable[tuple[Tensor, Tensor]] = (
            Pictures(index, clip.picture_format, order, mine, crops=crops, workers=workers, device=device)
            if self._numbers
            else ()
        )
        self._labels = torch.tensor(_numbers(index))
        # All captions are tokenized once; those of picture i are the rows offsets[i], …, offsets[i + 1] − 1.
        self._offsets = torch.tensor(np.cumsum([0] + [len(captions) for captions in index.captions]))
        self._tokens = clip.tokenizer([caption for captions in index.captions for caption in captions])

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Batch]:
        for number, (image, index) in zip(self._numbers, self._pictures, strict=True):
            start, count = self._offsets[index], self._offsets[index + 1] - self._offsets[index]
            choice = torch.from_numpy(caption_choice(self._batch_size, self._seed, number)[self._mine])
            text, label = self._tokens[start + (choice * count).long()], self._labels[index]
            yield Batch(image, text.to(self._device), label.to(self._device), index)


def _numbers(index: Index) -> list[int]:
    """Return the number of each picture's class, or of its file where it has no label."""
    number = {name: i for i, name in enumerate(index.classes)}
    alone = dict.fromkeys(i for i, n in zip(index.images, index.labels, strict=True) if n is None)
    file = {image: len(number) + i for i, image in enumerate(alone)}
    return [
        file[image] if label is None else number[label]
        for image, label in zip(index.images, index.labels, strict=True)
    ]
