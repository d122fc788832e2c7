"""Order of the pictures, crops, captions and dropped adapters: pure functions of seed, epoch and batch.

No state is hidden in a loader, so that a run can begin at any batch without reading those before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

ATTEMPTS, RATIO = 10, 4 / 3  # of a random crop: draws until one fits, and the largest ratio of its sides

# Streams of random numbers of a batch: apart from each other, and from an epoch's, which has no third number.
CROPS, CAPTIONS, DROPS = 1, 2, 3


def shuffled(size: int, batch_size: int, steps: int, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """Yield the pictures [batch_size] int64 of the batches ``first``, …, ``steps`` − 1.

    Every epoch is a permutation of 0, …, ``size`` − 1 that depends on (seed, epoch) alone; batches follow each
    other without regard to the end of an epoch.
    """
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
    """Yield every picture once, in order, [≤ batch_size] int64; the last batch may be short."""
    for start in range(0, size, batch_size):
        yield np.arange(start, min(start + batch_size, size))


class Crops(NamedTuple):
    """The random numbers that make the crops of a batch of n pictures, float32.

    ``sides`` [n, 2, ATTEMPTS]: height and width of each attempt, relative to the side of the square that has
    the picture's area.
    ``place`` [n, 2]: where the crop lies between the picture's edges, from 0 to 1, downwards and to the right.
    """

    sides: np.ndarray
    place: np.ndarray

    def of(self, part: slice) -> Crops:
        """Return the crops of a part of the batch."""
        return Crops(self.sides[part], self.place[part])


def random_crops(batch_size: int, seed: int, batch: int, smallest: float) -> Crops:
    """Return the crops of a batch, distributed as in torchvision's ``RandomResizedCrop``.

    The area of a crop is uniform in [``smallest``, 1] of the picture's, and the logarithm of width / height is
    uniform in ±log ``RATIO``.
    """
    draw = np.random.default_rng((seed, batch, CROPS))
    area = draw.uniform(smallest, 1, (batch_size, ATTEMPTS))
    ratio = np.exp(draw.uniform(-math.log(RATIO), math.log(RATIO), (batch_size, ATTEMPTS)))
    sides = np.sqrt(np.stack([area / ratio, area * ratio], 1))
    return Crops(sides.astype(np.float32), draw.random((batch_size, 2), np.float32))


def caption_choice(batch_size: int, seed: int, batch: int) -> np.ndarray:
    """Return a number in [0, 1) for each picture of a batch, [batch_size] float64, that chooses its caption."""
    return np.random.default_rng((seed, batch, CAPTIONS)).random(batch_size)


def adapter_draws(count: int, seed: int, batch: int) -> np.ndarray:
    """Return a number in [0, 1) for each adapter, [count] float64, that decides whether a batch drops it."""
    return np.random.default_rng((seed, batch, DROPS)).random(count)
