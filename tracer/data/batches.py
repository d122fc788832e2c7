"""Batches of a training run: pictures, tokens and labels."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tracer.data.config import LoadingSettings
from tracer.data.index import Index
from tracer.data.loader import load
from tracer.data.names import note
from tracer.data.order import Order, caption_choice, changes, random_crops
from tracer.data.plan import Plan, Work
from tracer.data.skipped import Skipped
from tracer.data.tokens import Tokens
from tracer.errors import UserError
from tracer.models.clip import Clip
from tracer.words import counted

TOKENS_AHEAD = 4  # batches whose tokens are made before they are asked for
WAITED = 0.05  # share of the time that training may wait for pictures without a word about it


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


@dataclass(frozen=True)
class Variation:
    """How a run varies its pictures from epoch to epoch; all of it is a function of the seed and the batch.

    Attributes:
        crop_scale: smallest share of a picture's area that a random crop keeps.
        flip: mirror half of the pictures.
        color_jitter: brightness, contrast and saturation are multiplied by factors in 1 ± this.
        shuffle_window: see :class:`~tracer.data.order.Order`.
    """

    crop_scale: float
    flip: bool = False
    color_jitter: float = 0.0
    shuffle_window: int = 0


def check_enough(index: Index, batch_size: int) -> None:
    """Raise UserError if a data set has fewer pictures than one batch."""
    if len(index) < batch_size:
        raise UserError(
            f"'{index.name}' holds {counted(len(index), 'picture')}, fewer than one batch of {batch_size}: "
            "lower --batch_size or add pictures"
        )


class TrainingBatches:
    """Iterate over the batches ``first``, …, ``steps`` − 1 of a run; those before ``first`` are not read.

    Args:
        index: the data set; a label's number is its place in ``index.classes``. A picture without a label gets
            the next free number, so that in the loss its captions are its only positives.
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
        loading: how pictures are decoded; default: the defaults, with ``workers`` threads.
        variation: flips, colours and the order; default: ``crop_scale`` alone.
        skipped: pictures that failed before ``first``, and those that will; default: none so far.

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
        loading: LoadingSettings | None = None,
        variation: Variation | None = None,
        skipped: Skipped | None = None,
    ):
        if batch_size % world_size:
            raise ValueError(f"batch_size is {batch_size}: it must be divisible by world_size {world_size}")
        check_enough(index, batch_size)
        loading = replace(loading or LoadingSettings(), workers=workers)
        mine = batch_size // world_size
        self._mine, self._rank = slice(rank * mine, (rank + 1) * mine), rank if world_size > 1 else None
        self._variation = variation or Variation(crop_scale)
        self._numbers, self._seed, self._batch_size = range(first, steps), seed, batch_size
        self._index, self._tokens = index, Tokens(clip.tokenizer)
        self._order = Order(len(index), batch_size, seed, self._variation.shuffle_window)
        self._device = torch.device(device)
        self.skipped = Skipped(len(index), loading.max_bad) if skipped is None else skipped
        self._plan = Plan(
            index,
            clip.picture_format,
            loading,
            self._work,
            self._numbers,
            mine,
            self._order,
            self.skipped,
            self._device,
        )
        self._labels = torch.from_numpy(index.label_numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Batch]:
        texts: deque[Future[Tensor]] = deque()
        given = 0
        coming, waiting = iter(self._numbers), _Waiting(len(self._index), self._batch_size, self._rank)
        pictures = iter(load(self._plan))
        try:
            for number in self._numbers:
                while len(texts) < TOKENS_AHEAD and (later := next(coming, None)) is not None:
                    texts.append(self._tokens.ahead(partial(self._drawn_captions, later)))
                with waiting:
                    image, rows = next(pictures)
                    text = texts.popleft().result()
                if not np.array_equal(rows.numpy(), self._rows(number)):  # pictures that stand in
                    text = self._tokens.of(self._captions(number, rows.numpy()))
                label = self._labels[rows].to(self._device)
                given += 1
                yield Batch(image, text.to(self._device).long(), label, rows)
                waiting.trained()
        finally:
            if given == len(self):  # a run ends within an epoch, and asks for nothing behind its last batch
                waiting.report(waiting.came)
            self._tokens.close()

    def _rows(self, number: int) -> np.ndarray:
        """Return the pictures of this rank's slice of a batch."""
        return self._order.batch(number)[self._mine]

    def _work(self, number: int) -> Work:
        crops = random_crops(self._batch_size, self._seed, number, self._variation.crop_scale)
        drawn, variation = None, self._variation
        if variation.flip or variation.color_jitter:
            flip, jitter = variation.flip, variation.color_jitter
            drawn = changes(self._batch_size, self._seed, number, flip=flip, jitter=jitter).of(self._mine)
        return Work(number, self._rows(number), crops.of(self._mine), self._mine.start, drawn)

    def _drawn_captions(self, number: int) -> list[str]:
        return self._captions(number, self._rows(number))

    def _captions(self, number: int, rows: np.ndarray) -> list[str]:
        """Return the caption that a batch draws for each picture of this rank's slice."""
        choice = caption_choice(self._batch_size, self._seed, number)[self._mine]
        return self._index.drawn(rows, choice)


class _Waiting:
    """Measures the time that a loop waits for its next batch, and reports it once an epoch where it is long.

    Args:
        pictures: of an epoch.
        batch_size: pictures of a batch, on all ranks together.
        rank: of this process, where there are several.
    """

    def __init__(self, pictures: int, batch_size: int, rank: int | None) -> None:
        self._pictures, self._batch_size, self._rank = pictures, batch_size, rank
        self._seen, self._epoch, self._waited = 0, 1, 0.0
        self._started: float | None = None  # when the first batch had come: a loop waits for that in any case
        self.came = 0.0  # when the last batch had come

    def __enter__(self) -> None:
        self._asked = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.came = time.perf_counter()
        if self._started is None:
            self._started = self.came
        else:
            self._waited += self.came - self._asked

    def trained(self) -> None:
        """Count a batch that was trained on; at the end of an epoch say how long the loop has waited."""
        self._seen += self._batch_size
        while self._seen >= self._pictures * self._epoch:
            self.report(time.perf_counter())
            self._epoch += 1

    def report(self, now: float) -> None:
        """Say how long the loop has waited from the last report to ``now``, if that was much of the time."""
        share = 0.0 if self._started is None else self._waited / max(now - self._started, 1e-9)
        self._waited, self._started = 0.0, now
        if share > WAITED:
            where = "" if self._rank is None else f"rank {self._rank}: "
            note(
                f"{where}training waited for pictures {share:.0%} of epoch {self._epoch}: give more --workers, "
                "smaller files, or --jpeg scaled"
            )
