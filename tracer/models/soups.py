"""Model soups: weights made of the weights of several models of one architecture, which all began at one start."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def interpolate(start: Weights, end: Weights, alpha: float) -> Weights:
    """Return WiSE-FT's weights (Wortsman et al. 2022, arXiv 2109.01903): (1 − α)·start + α·end.

    Args:
        start: state dict of the model before fine-tuning, with at least the entries of ``end``.
        end: state dict after fine-tuning. Floating-point entries are interpolated in float32 and returned in
            their own dtype; others (counters, indices) are taken from here as they are.
        alpha: α in [0, 1]; 0 gives ``start``, 1 gives ``end``.
    """
    return {
        name: torch.lerp(start[name].float(), value.float(), alpha).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in end.items()
    }


def uniform(models: Sequence[Weights]) -> Weights:
    """Return the uniform soup, the mean of the weights (Wortsman et al. 2022, arXiv 2203.05482).

    Floating-point entries are added in float32 and returned in their own dtype; others are the first model's.

    Raises:
        ValueError: there is no model, or one has other weights than the first.
    """
    _refuse_strangers(models)
    first = models[0]
    return {
        name: (sum(m[name].float() for m in models) / len(models)).to(value.dtype)  # type: ignore[union-attr]
        if value.is_floating_point()
        else value
        for name, value in first.items()
    }


def greedy(
    models: Sequence[Weights], validate: Callable[[Weights], float], scores: Sequence[float] | None = None
) -> tuple[Weights, list[int]]:
    """Return the greedy soup and the numbers of the models in it, in the order in which they came in.

    The models are tried from the best to the worst; one stays if the mean with it validates at least as well
    (Wortsman et al. 2022, arXiv 2203.05482, recipe 1).

    Args:
        models: state dicts.
        validate: the score of weights on validation data; larger is better.
        scores: those of the models, where they are known.

    Raises:
        ValueError: there is no model, or one has other weights than the first.
    """
    _refuse_strangers(models)
    known = list(scores) if scores is not None else [validate(model) for model in models]
    order = sorted(range(len(models)), key=lambda n: -known[n])
    chosen, best = [order[0]], known[order[0]]
    for number in order[1:]:
        score = validate(uniform([models[n] for n in (*chosen, number)]))
        if score >= best:
            chosen.append(number)
            best = score
    return uniform([models[n] for n in chosen]), chosen


def fisher_weighted(models: Sequence[Weights], fishers: Sequence[Weights], floor: float = 1e-6) -> Weights:
    """Return the mean weighted by diagonal Fisher information, entry by entry (Matena & Raffel 2022, arXiv "
    "2111.09832).

    θ = Σ F_i θ_i / Σ F_i, with each F_i at least ``floor``, so that entries about which no model knows anything
    become the plain mean. Entries without Fisher information are those of the uniform soup.

    Args:
        models: state dicts.
        fishers: {name of a weight: its Fisher information, of the weight's shape}, one for each model.
        floor: smallest Fisher information of an entry.

    Raises:
        ValueError: there is no model, one has other weights than the first, or a Fisher information is missing.
    """
    soup = uniform(models)
    if len(fishers) != len(models):
        raise ValueError(f"{len(models)} models have {len(fishers)} Fisher informations: give one for each")
    for name in fishers[0]:
        weights = torch.stack([fisher[name].float().clamp(min=floor) for fisher in fishers])
        values = torch.stack([model[name].float() for model in models])
        soup[name] = ((weights * values).sum(0) / weights.sum(0)).to(soup[name].dtype)
    return soup


def _refuse_strangers(models: Sequence[Weights]) -> None:
    """Raise ValueError unless all models have the weights of the first, by name and shape."""
    if not models:
        raise ValueError("a soup needs at least one model")
    shapes = {name: value.shape for name, value in models[0].items()}
    for number, model in enumerate(models[1:], 2):
        other = {name: value.shape for name, value in model.items()}
        if other != shapes:
            name = next(n for n in (*shapes, *other) if shapes.get(n) != other.get(n))
            has = [f"shape {list(s[name])}" if name in s else "no such weight" for s in (shapes, other)]
            raise ValueError(
                f"model {number} of the soup has another architecture than model 1: '{name}' has {has[0]} there "
                f"and "
                f"{has[1]} here; mix checkpoints of one start alone"
            )
