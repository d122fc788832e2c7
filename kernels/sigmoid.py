"""The sigmoid form as a call: each pair is on its own, so one walk yields the terms and their gradients.

Every implementation has the same function::

    walk(inputs: Inputs, biases: Biases, options: Options, needs: PairNeeds, upstream: Tensor | None) -> Pairs

No statistics of rows or columns are needed, and a rectangle of the matrix is walked over like the whole of it. All
results are those of *sums* over pairs: who divides by the number of rows does so afterwards, in full precision.
``contrastive_eager`` defines the values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .contrastive import Inputs, Options


class PairNeeds(NamedTuple):
    """What a walk computes; nothing else is."""

    sums: bool = True
    image: bool = False
    text: bool = False
    logit_scale: bool = False
    logit_bias: bool = False

    @property
    def gradients(self) -> bool:
        """Return whether any gradient is asked for."""
        return any(self[1:])


class Pairs(NamedTuple):
    """Result of a walk, all in :func:`contrastive.accumulation_dtype`; None where not asked for.

    The gradients are those of ``upstream · sums``, of the sum of the sums without an upstream gradient.
    """

    sums: Tensor | None  # [len(TERMS)], sums over pairs; 0 where a term is off or takes no sigmoid
    image: Tensor | None  # [N, D]
    text: Tensor | None  # [M, D]
    logit_scale: Tensor | None
    logit_bias: Tensor | None


def rows_with_positives(inputs: Inputs, options: Options, text_labels: Tensor | None) -> Tensor | int:
    """Return over how many of these rows the means run; ``text_labels`` are those of the whole matrix."""
    if not options.ignore or inputs.labels is None or text_labels is None:
        return len(inputs.image)
    ordered = text_labels.sort().values
    after = torch.searchsorted(ordered, inputs.labels, right=True)
    return (after > torch.searchsorted(ordered, inputs.labels)).sum()


def divisor(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the number of rows that a mean runs over; NaN for none, as the mean of no softmax is."""
    return rows.to(dtype).masked_fill(rows == 0, math.nan)
