"""Order of the pictures, crops and captions: pure functions of the seed, the epoch and the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

ATTEMPTS, RATIO = 10, 4 / 3  # of a random crop: draws until one fits, and the largest ratio of its sides

CROPS, CAPTIONS = 1, 2  # set apart the random numbers of a batch, and both from those of an epoch


def shuffled(size: int, batch_size: int, steps: int, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """Batches ``first``, … ``steps`` − 1 of indices; every epoch is a permutation known from (seed, epoch)."""
    epoch, done = divmod(first * batch_size, size)
    order = _permutation(size, seed, epoch)[done:]
    for _ in range(first, steps):
        while len(order) < batch_size:
            epoch += 1
            order = np.concatenate([order, _permutation(size, seed, epoch)])
        yield order[:batch_size]
        order = order[batch_size:]


def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def in_order(size: int, batch_size: int) -> Iterator[np.ndarray]:
    """Every index once; the last batch may be short."""
    for start in range(0, size, batch_size):
        yield np.arange(start, min(start + batch_size, size))


class Crops(NamedTuple):
    """What the random crops of a batch of n pictures are made of, float32.

    ``sides`` [n, 2, ATTEMPTS]: height and width, in sides of a square as large as the picture.
    ``place`` [n, 2]: where the crop lies between the picture's edges, from 0 to 1, downwards and to the right.
    """

    sides: np.ndarray
    place: np.ndarray


def random_crops(batch_size: int, seed: int, batch: int, smallest: float) -> Crops:
    """Areas uniform in [``smallest``, 1] of the picture's, log(width / height) uniform in ±log RATIO."""
    draw = np.random.default_rng((seed, batch, CROPS))
    area = draw.uniform(smallest, 1, (batch_size, ATTEMPTS))
    ratio = np.exp(draw.uniform(-math.log(RATIO), math.log(RATIO), (batch_size, ATTEMPTS)))
    sides = np.sqrt(np.stack([area / ratio, area * ratio], 1))
    return Crops(sides.astype(np.float32), draw.random((batch_size, 2), np.float32))
