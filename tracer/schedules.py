"""Schedules of a moving average: how far it moves after each optimizer step.

Sources: WMA and EMA from TRACER (arXiv 2605.29380).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["EMA", "WMA", "Frozen", "Schedule", "Uniform"]
from tracer import recipes


class Schedule(ABC):
    """How far the average moves: θ̄_k = θ̄_{k−1} + weight(k) · (θ_k − θ̄_{k−1}), θ̄_0 = pretrained.

    The step is the only state: ``weight(step)`` is a pure function of it.

    Attributes:
        every: the average moves after the steps that ``every`` divides, and rests (weight 0) after the others.
    """

    every: int = 1

    def __post_init__(self) -> None:
        self._check_at_least_1("every", self.every)

    def weight(self, step: int) -> float:
        """Return the weight in [0, 1] after optimizer step ``step`` = 1, 2, …; 0 where the average rests.

        Raises:
            ValueError: ``step`` is below 1, or past the run that the schedule was made for.
        """
        if step < 1:
            raise ValueError(f"step is {step}: the first update follows optimizer step 1")
        return 0.0 if step % self.every else self._weight(step)

    @abstractmethod
    def _weight(self, step: int) -> float:
        """Return the weight after a step that ``every`` divides."""

    def _check_at_least_1(self, name: str, value: int) -> None:
        if value < 1:
            raise ValueError(f"{type(self).__name__}.{name} is {value}: at least 1")


@lru_cache(maxsize=4)
def _wma_weights(total_steps: int, beta: float, every: int) -> Tensor:
    """Return w_k / Σ_{i≤k} w_i over the visited steps k = 0, every, 2·every, … ≤ total_steps, in float64.

    w_k = x^(β−1) (1−x)^(β−1) at x = (k + ½)/(K + 1); the constant 1/B(β, β) cancels in the ratio.
    """
    x = (torch.arange(0, total_steps + 1, every, dtype=torch.float64) + 0.5) / (total_steps + 1)
    log_w = (beta - 1) * (x.log() + (-x).log1p())
    return torch.exp(log_w - torch.logcumsumexp(log_w, 0))


@dataclass(frozen=True)
class WMA(Schedule):
    """Weighted moving average: w_k = pdf of Beta(β, β) at (k + ½)/(K + 1), k = 0 … K = total_steps.

    θ̄_k is the mean of θ_0 … θ_k under the weights w_0 … w_k; with ``every`` > 1, the mean over the
    visited steps 0, every, 2·every, … only. β = ½ favours the start and the end of the run, β = 1
    is the uniform average.
    """

    total_steps: int
    beta: float = recipes.WMA.beta
    every: int = recipes.WMA.every

    def __post_init__(self) -> None:
        self._check_at_least_1("total_steps", self.total_steps)
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"WMA.beta is {self.beta}: a Beta(β, β) density needs β > 0")

    def _weight(self, step: int) -> float:
        if step > self.total_steps:
            raise ValueError(
                f"step {step} is past WMA.total_steps = {self.total_steps}: make that the run's length"
            )
        return float(_wma_weights(self.total_steps, self.beta, self.every)[step // self.every])


@dataclass(frozen=True)
class EMA(Schedule):
    """Exponential moving average, θ̄ ← m θ̄ + (1 − m) θ every ``every`` steps.

    The momentum m rises linearly from ``start`` to ``end`` over the first ``warmup`` · total_steps
    steps and stays there.
    """

    total_steps: int
    start: float = recipes.EMA.start
    end: float = recipes.EMA.end
    warmup: float = recipes.EMA.warmup
    every: int = recipes.EMA.every

    def __post_init__(self) -> None:
        self._check_at_least_1("total_steps", self.total_steps)
        super().__post_init__()
        for name in ("start", "end", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"EMA.{name} is {getattr(self, name)}: between 0 and 1")

    def _weight(self, step: int) -> float:
        ramp = self.warmup * self.total_steps
        return 1.0 - (self.start + (self.end - self.start) * (min(1.0, step / ramp) if ramp else 1.0))


@dataclass(frozen=True)
class Uniform(Schedule):
    """Uniform mean of the visited parameters θ_0, θ_every, θ_{2·every}, …"""

    every: int = 1

    def _weight(self, step: int) -> float:
        return 1.0 / (step // self.every + 1)


@dataclass(frozen=True)
class Frozen(Schedule):
    """No movement: the teacher keeps the pretrained weights."""

    def _weight(self, step: int) -> float:
        return 0.0
