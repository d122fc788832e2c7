"""Order of the pictures, crops, captions and dropped adapters: pure functions of seed, epoch and batch.

No state is hidden in a loader, so that a run can begin at any batch without reading those before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

ATTEMPTS, RATIO = 10, 4 / 3  # of a random crop: draws until one fits, and the largest ratio of its sides

RUNS = 16  # runs of neighbours in a shuffle window

# Streams of random numbers of a batch: apart from each other, and from an epoch's, which has no third number.
CROPS, CAPTIONS, DROPS, CHANGES = 1, 2, 3, 4


class Order:
    """The order in which a run sees ``size`` pictures, in batches: a function of the seed and the epoch alone.

    Every epoch is a permutation of 0, …, ``size`` − 1; batches follow each other without regard to the end of an
    epoch.

    Args:
        size: pictures of the data set.
        batch_size: pictures of a batch.
        seed: of the order.
        window: 0 permutes freely. Otherwise runs of neighbours are permuted, a :data:`RUNS`-th of the window each,
            and then the pictures within each window: a disk reads whole runs.
    """

    def __init__(self, size: int, batch_size: int, seed: int, window: int = 0) -> None:
        self.size, self.batch_size, self.seed, self.window = size, batch_size, seed, window
        self._permutations: dict[int, np.ndarray] = {}

    def batch(self, number: int) -> np.ndarray:
        """Return the pictures of a batch [batch_size] int64."""
        first, wanted = number * self.batch_size, self.batch_size
        parts = []
        while wanted:
            epoch, place = divmod(first, self.size)
            part = self._permutation(epoch)[place : place + wanted]
            parts.append(part)
            first, wanted = first + len(part), wanted - len(part)
        return np.concatenate(parts)

    def instead(self, number: int, place: int, attempt: int) -> int:
        """Return the picture that stands in for one of a batch: the one ``attempt`` places later in its epoch."""
        epoch, position = divmod(number * self.batch_size + place, self.size)
        return int(self._permutation(epoch)[(position + attempt) % self.size])

    def _permutation(self, epoch: int) -> np.ndarray:
        made = self._permutations.get(epoch)
        if made is None:
            made = permutation(self.size, self.seed, epoch, self.window)
            # The loader's threads are in the present epoch or the next one; an older one is not needed again.
            kept = {e: p for e, p in self._permutations.items() if abs(e - epoch) <= 2}
            self._permutations = kept | {epoch: made}
        return made


def permutation(size: int, seed: int, epoch: int, window: int = 0) -> np.ndarray:
    """Return the order of an epoch [size] int64; see :class:`Order`."""
    draw = np.random.default_rng((seed, epoch))
    if not window or window >= size:
        return draw.permutation(size)
    length = max(1, window // RUNS)
    runs = draw.permutation(-(-size // length))
    order = (runs[:, None] * length + np.arange(length)).ravel()
    order = order[order < size]
    for start in range(0, size, window):
        draw.shuffle(order[start : start + window])
    return order


def shuffled(size: int, batch_size: int, steps: int, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """Yield the pictures [batch_size] int64 of the batches ``first``, …, ``steps`` − 1; see :class:`Order`."""
    order = Order(size, batch_size, seed)
    return (order.batch(number) for number in range(first, steps))


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


class Changes(NamedTuple):
    """How the pictures of a batch of n are changed after the crop.

    ``flipped`` [n] bool: mirrored left to right.
    ``factors`` [n, 3] float32: of brightness, contrast and saturation; None: the colours stay.
    """

    flipped: np.ndarray
    factors: np.ndarray | None

    def of(self, part: slice) -> Changes:
        """Return the changes of a part of the batch."""
        return Changes(self.flipped[part], None if self.factors is None else self.factors[part])


def changes(batch_size: int, seed: int, batch: int, *, flip: bool, jitter: float) -> Changes:
    """Return random changes: ``flip`` mirrors half of the pictures, factors are uniform in 1 ± ``jitter``."""
    draw = np.random.default_rng((seed, batch, CHANGES))
    flipped = draw.random(batch_size) < (0.5 if flip else 0.0)
    factors = draw.uniform(1 - jitter, 1 + jitter, (batch_size, 3)).astype(np.float32)
    return Changes(flipped, factors if jitter else None)
