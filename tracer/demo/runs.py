"""The runs of a comparison: what each one's settings are, and trained unless it is there already."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from tracer.demo.config import SweepConfig
from tracer.demo.methods import METHODS
from tracer.files import aside, check_ours, remove_folder
from tracer.train.config import Config
from tracer.train.identity import differences_from, identity_of, is_run_of
from tracer.train.run import Series, finetune

VALIDATION = "validation"  # what runs call the set by which settings are chosen

Point = dict[str, Any]  # settings of a trial, by their names

COMMON = {field.name: field.default for field in dataclasses.fields(Config)}


def settings_of(config: SweepConfig, method: str, point: Point, seed: int, name: str) -> Config:
    """Return the settings of a run: the point's, else the user's, else the method's.

    ``lr_times`` multiplies the rate that the method has without it: its published one, or --lr; --adapter_lr where
    adapters train. What tells a variant from its method is never the user's.

    Args:
        config: of the comparison.
        method: name of the method.
        point: of the grid.
        seed: of the run.
        name: of its folder.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}
    chosen = METHODS[method]
    values |= {n: v for n, v in chosen.settings.items() if chosen.variant_of or values[n] == COMMON[n]}
    values |= {"seed": seed, "output": config.output / name, "eval_data": {VALIDATION: config.validation}}
    if chosen.adapted:
        values["lr"] = config.adapter_lr
    run = Config(**values)
    times = point.get("lr_times")
    run.lr = run.lr if times is None else run.recipe.lr * times
    changes = {n: v for n, v in point.items() if n != "lr_times"}
    return dataclasses.replace(run, **{"steps": None} | changes if "epochs" in changes else changes)


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
