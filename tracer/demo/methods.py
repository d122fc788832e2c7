"""The methods that the demo trains, and their runs."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

from tracer.demo.config import DemoConfig
from tracer.files import aside, check_ours, remove_folder
from tracer.train.config import Config
from tracer.train.identity import differences_from, identity_of, is_run_of
from tracer.train.run import Series, finetune
from tracer.train.scoring import Baseline


class TrainedMethod(NamedTuple):
    """A method that needs a training run of its own: how the report calls it, and what it sets."""

    name: str
    note: str
    settings: dict[str, Any]


METHODS = {
    "flyp": TrainedMethod("FLYP", "contrastive loss only", {"method": "flyp"}),
    "ema": TrainedMethod(
        "TRACER, EMA",
        "distillation from an exponential average",
        {"method": "tracer", "teacher": "ema"},
    ),
    "wma": TrainedMethod(
        "TRACER, WMA", "distillation from the weighted average", {"method": "tracer", "teacher": "wma"}
    ),
    "r-adapter": TrainedMethod(
        "R-Adapter", "adapters alone, MPM-NCE, three self-ensembles", {"method": "r-adapter"}
    ),
}

# The variants of R-Adapter that need a training run of their own.
TRAINED_VARIANTS = {
    "r-adapter-infonce": TrainedMethod(
        "R-Adapter, InfoNCE",
        "one positive, no margin, no smoothing",
        {"method": "r-adapter", "positives": False, "margin": 0.0, "smoothing": 0.0},
    ),
    "r-adapter-no-drop": TrainedMethod(
        "R-Adapter, no dropping",
        "every adapter in every step",
        {"method": "r-adapter", "adapter_drop": 0.0},
    ),
}

Runs = dict[str, list[Path]]  # method → the folder of its run, for each seed


def train_all(config: DemoConfig, baseline: Baseline | None = None) -> Runs:
    """Return the folders of all runs, trained now or earlier; ``baseline`` has the start's scores."""
    trained = METHODS | TRAINED_VARIANTS if config.ablate else METHODS
    count = len(trained) * config.seeds
    runs: Runs = {}
    for n, (key, method) in enumerate(trained.items()):
        titles = [
            f"run {n * config.seeds + seed + 1} of {count}: {key}-{seed}" for seed in range(config.seeds)
        ]
        runs[key] = [
            finetune_once(config, key, method.settings, seed, Series(title, baseline))
            for seed, title in enumerate(titles)
        ]
    return runs


def finetune_once(
    config: DemoConfig, key: str, changes: dict[str, Any], seed: int, series: Series | None = None
) -> Path:
    """Return the folder of one run of a method; see :func:`run_once`."""
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)} | changes
    run = Config(**settings | {"seed": seed, "output": config.output / f"{key}-{seed}"})
    if run.adapted:
        run.lr = config.adapter_lr
    return run_once(run, series)


def run_once(run: Config, series: Series | None = None) -> Path:
    """Return the folder of a run; train it unless it is there with the same settings, data, start and version.

    An unfinished run with the same settings is resumed. A run with other settings, finished or not, is
    replaced. ``series`` says of which series of runs it is part.
    """
    part = aside(run.output)
    for folder in (run.output, part):
        if os.path.lexists(folder):
            check_ours(folder)
    if run.output.exists():
        if is_run_of(run, run.output):
            return run.output
        if part.exists():
            remove_folder(part)
        run.output.rename(part)  # so that it is never half deleted under its own name
    if part.exists() and differences_from(part, identity_of(run)):
        remove_folder(part)
    return finetune(run, series or Series(run.output.name, None))
