"""What a user should know of a run before it starts: options without effect, averages that rest, small sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from torch import nn

from tracer.evaluation.sets import EvaluationSet
from tracer.models.clip import projections
from tracer.train.config import Config
from tracer.train.ranks import ranks
from tracer.words import counted

FEW_PICTURES = 100  # below it the standard error of an accuracy can exceed 5 points

OF_EMA = ("ema_start", "ema_end", "ema_warmup")
OF_TERMS = ("relational", "feature", "interactive", "cross")
OF_PENALTIES = ("projection_product", "projection_orthogonal")
OF_THE_TEACHER = (
    *("teacher", "teacher_every", "teacher_temperature", "wma_beta", *OF_EMA),
    *("distill_weight", *OF_TERMS),
)
OF_ADAPTERS = ("adapter_rank", "adapter_drop", "adapter_momentum", "adapter_alpha", "adapter_towers")


def caution_of_size(name: str, pictures: int) -> str | None:
    """Return a sentence about a set whose size leaves its accuracy unsure; None for a set that is large enough."""
    if pictures >= FEW_PICTURES:
        return None
    error = 50 / pictures**0.5  # of an accuracy of 50 %, the worst case
    return (
        f"'{name}' has {counted(pictures, 'picture')}: an accuracy on it has a standard error of up to "
        f"{error:.0f} points"
    )


def cautions_of_sizes(sets: Iterable[EvaluationSet]) -> list[str]:
    """Return a sentence about each set whose size leaves its scores unsure."""
    return [text for each in sets if (text := caution_of_size(each.name, len(each.index)))]


def idle_options(config: Config) -> Iterator[str]:
    """Yield a sentence about the options that were chosen, and that the others leave without effect."""
    for names, why in _idle(config):
        options = [f"--{name} {getattr(config, name)}" for name in names if _chosen(config, name)]
        if options:
            yield f"{', '.join(options)} {'has' if len(options) == 1 else 'have'} no effect {why}"


def _idle(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the settings that the others make idle, and why."""
    if config.method != "tracer":
        yield OF_THE_TEACHER + OF_PENALTIES, f"with --method {config.method}, which has no teacher"
    else:
        if config.teacher != "ema":
            yield OF_EMA, f"with --teacher {config.teacher}"
        if config.teacher != "wma":
            yield ("wma_beta",), f"with --teacher {config.teacher}"
        if config.teacher == "frozen":
            yield ("teacher_every",), "with --teacher frozen"
        if config.distill_weight == 0:
            yield OF_TERMS, "with --distill_weight 0"
        if config.adapted:
            yield OF_PENALTIES, "where adapters train, which leave the projections as they are"
    if not config.adapted:
        yield OF_ADAPTERS, "without adapters: add --adapters true, or choose --method r-adapter"
    if config.classifier != "none":
        yield ("positives", "margin", "smoothing"), f"with --classifier {config.classifier}"
    if not config.ldreg:
        yield ("ldreg_neighbours",), "without --ldreg"
    if not config.eval_data and config.classifier == "none":
        yield ("classes", "prompt_template"), "without evaluation sets: give --eval_data.NAME"
    if config.micro_batch is not None and config.micro_batch >= config.batch_size:
        yield ("micro_batch",), f"as it is not below --batch_size {config.batch_size}"
    if ranks().size == 1:
        yield ("mesh",), "on a single process"


def _chosen(config: Config, name: str) -> bool:
    """Return whether a setting differs from its default."""
    (field,) = (field for field in dataclasses.fields(config) if field.name == name)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return getattr(config, name) != default


def missing_parts(config: Config, model: nn.Module) -> list[str]:
    """Return a sentence if the model lacks the projections that ``config`` would penalise."""
    if not config.penalised or projections(model) is not None:
        return []
    weights = [f"--{name} {value:g}" for name in OF_PENALTIES if (value := getattr(config, name))]
    verb = "has" if len(weights) == 1 else "have"
    return [
        f"{' and '.join(weights)} {verb} no effect: a tower of the model does not end with a linear projection (a "
        "ResNet ends with attention), so that there is none to penalise"
    ]


def resting_averages(config: Config) -> Iterator[str]:
    """Yield a sentence for each average that will not move, or not far enough, in the steps of ``config``."""
    if config.method == "tracer" and config.teacher != "frozen" and config.moves_every > config.total_steps:
        yield (
            f"the teacher will not move: it does so every {config.moves_every} steps, and the run has "
            f"{config.total_steps}; lower --teacher_every"
        )
    reached = 1 - config.adapter_momentum**config.total_steps
    if config.adapted and reached < 0.8:
        yield (
            f"the adapters' average will hold {reached:.0%} of them: with so few steps, "
            f"choose an --adapter_momentum below {config.adapter_momentum:g}"
        )
