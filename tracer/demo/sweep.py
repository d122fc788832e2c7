"""The protocol of a fair comparison: the same trials for every method, chosen by validation in distribution alone.

Every method is trained once for each point of a declared grid. The trial with the best validation score decides
its settings; the other seeds are trained with them. Only then are the test sets read, once for each chosen model.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tracer.demo.compare import (
    Clock,
    command_line,
    described,
    prepare_data,
    report,
    validation_set,
)
from tracer.demo.config import SweepConfig
from tracer.demo.judge import Judge, choose_examples
from tracer.demo.methods import METHODS
from tracer.demo.runs import VALIDATION, Point, run_once, settings_of
from tracer.demo.tested import Tested
from tracer.errors import Diverged, UserError
from tracer.evaluation.recognise import check_prompts
from tracer.files import check_folder, claim_folder, whole_file, write_json
from tracer.models.choice import check_model
from tracer.models.clip import Clip
from tracer.train.classifier import check_classes
from tracer.train.config import Config
from tracer.train.identity import training_index
from tracer.train.run import Series, check_trainable
from tracer.train.scoring import Baseline
from tracer.words import counted

DECLARED = "declared.json"  # what the trials are, written before the first of them


class Trial(NamedTuple):
    """A run of a method at one point of the grid, its learning rate, and its score on the validation set.

    The score is NaN where the run diverged; then the folder does not exist.
    """

    point: Point
    lr: float
    folder: Path
    score: float


class Choice(NamedTuple):
    """The trials of a method, and which of them was chosen."""

    trials: list[Trial]
    best: Trial
    why: str


def sweep(config: SweepConfig) -> Path:
    """Train every trial of every method, choose by validation, test what was chosen, and return the report's path.

    A sweep that was cut off goes on where it was; trials that are there are not trained again.

    Raises:
        UserError: anything in the settings or the data that the user can mend, or a grid that has changed.
    """
    clock = Clock()
    config.validate()
    command = command_line(config)
    check_folder(config.output)  # before the work, which takes long
    _refuse_another_grid(config)
    check_model(config.model, config.pretrained)
    config, sets = prepare_data(config)
    validation = validation_set(config, sets)
    _check_settings(config)
    check_prompts([*sets, validation], config.model, config.pretrained)
    judge = Judge.of(config, sets)
    _check_model(config, judge.clip)
    claim_folder(config.output)
    _declare(config)
    clock.lap("data")
    validating = dataclasses.replace(judge, sets=[validation], start_scored={})
    training = Training(config, validating.baseline())
    choices = {method: choose(training.trials(method), validation.measure) for method in config.compared}
    seeds = {method: training.seeds(method, choice.best) for method, choice in choices.items()}
    clock.lap("training")
    notes = {method: _chosen(choice) for method, choice in choices.items()}
    tested = Tested(config, judge, seeds, notes)
    results = tested.results()
    shown = {method: folders[0] for method, folders in seeds.items() if not METHODS[method].variant_of}
    results["examples"] = choose_examples(judge, shown)
    if config.soups:
        trials = {m: [(t.folder, t.score) for t in _scored(c.trials)] for m, c in choices.items()}
        results["soups"] = tested.soups(validating, trials)
    clock.lap("evaluation")
    results["choices"] = {method: _described(choice) for method, choice in choices.items()}
    about = described(config, judge, clock, "Robust fine-tuning, each method at its chosen settings", command)
    about["notices"] += training.lost
    return report(about | results, config.output)


def points(grid: dict[str, list[Any]]) -> list[Point]:
    """Return every combination of the grid's values, in the order in which they are declared."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def choose(trials: list[Trial], measure: str = "accuracy") -> Choice:
    """Return the trial with the best validation score, of equal ones the first, and the reason in words.

    Trials that diverged are no candidates; one trial at least must have a score.
    """
    scored = _scored(trials)
    best = max(scored, key=lambda trial: trial.score)  # the first of equal ones
    others = sorted((t.score for t in scored if t is not best), reverse=True)
    by = "" if measure == "accuracy" else f" by {measure}"
    why = f"the only trial: {100 * best.score:.1f} % on the validation set{by}"
    if others:
        why = (
            f"best of {len(scored)} trials on the validation set{by}: {100 * best.score:.1f} %, the next "
            f"{100 * others[0]:.1f} %"
        )
    lost = len(trials) - len(scored)
    return Choice(trials, best, why + (f"; {counted(lost, 'trial')} diverged" if lost else ""))


def _scored(trials: list[Trial]) -> list[Trial]:
    """Return the trials that did not diverge."""
    return [trial for trial in trials if math.isfinite(trial.score)]


def _refuse_another_grid(config: SweepConfig) -> None:
    path = config.output / DECLARED
    before = json.loads(path.read_text())["grid"] if path.is_file() else config.grid
    if before != config.grid:
        raise UserError(
            f"the grid of '{config.output}' was {json.dumps(before)} and is now {json.dumps(config.grid)}: all "
            "methods must get the same trials, so give another --output, or the grid of before"
        )


def _declare(config: SweepConfig) -> None:
    """Write down the grid before the first trial."""
    with whole_file(config.output / DECLARED) as part:
        write_json(part, {"grid": config.grid})


def _check_trials(config: SweepConfig, check: Callable[[Config], None]) -> None:
    """Let ``check`` see the settings of each trial before any is trained; its UserError then names the trial."""
    for method, point in itertools.product(config.compared, points(config.grid)):
        try:
            check(settings_of(config, method, point, 0, method))
        except UserError as error:
            raise UserError(f"{method} at {json.dumps(point)} of --grid: {error}") from error


def _check_settings(config: SweepConfig) -> None:
    """Refuse a trial whose settings make no sense, or not for the training data."""
    index = training_index(config)

    def check(run: Config) -> None:
        run.validate()
        check_classes(run, index)

    _check_trials(config, check)


def _check_model(config: SweepConfig, clip: Clip) -> None:
    """Refuse a trial whose settings the model does not allow."""

    def check(run: Config) -> None:
        check_trainable(run, dataclasses.replace(clip, model=copy.deepcopy(clip.model)))

    with torch.random.fork_rng(devices=[]):  # new parts draw their first values
        _check_trials(config, check)


class Training:
    """Trains the runs of the protocol; the bar of each says which of how many it is.

    Args:
        config: of the comparison.
        baseline: the start's scores on the validation set.

    Attributes:
        lost: what is said of each trial that diverged.
    """

    def __init__(self, config: SweepConfig, baseline: Baseline) -> None:
        self._config, self._baseline, self._points = config, baseline, points(config.grid)
        self._count = len(config.compared) * (len(self._points) + config.seeds - 1)
        self._started = 0
        self.lost: list[str] = []

    def trials(self, method: str) -> list[Trial]:
        """Return the trials of a method, in the order of the grid.

        One that diverges counts as lost, and is tried again when the sweep goes on after an interruption.

        Raises:
            Diverged: all of them diverged.
        """
        trials = [self._trial(method, number, point) for number, point in enumerate(self._points)]
        if not _scored(trials):
            raise Diverged(
                f"every trial of {method} diverged: leave it out of --methods, or give a lower --lr"
            )
        return trials

    def _trial(self, method: str, number: int, point: Point) -> Trial:
        run = settings_of(self._config, method, point, 0, f"{method}-trial-{number}")
        try:
            folder = self._run(run)
        except Diverged as error:
            self.lost.append(
                f"{run.output.name} diverged at {json.dumps(point)} and is no candidate: {error}"
            )
            warnings.warn(self.lost[-1], stacklevel=2)
            return Trial(point, run.recipe.lr, run.output, math.nan)
        score = json.loads((folder / "metrics.json").read_text())["scores"]["student"][VALIDATION]
        return Trial(point, run.recipe.lr, folder, score[score["measure"]])

    def seeds(self, method: str, best: Trial) -> list[Path]:
        """Return the folder of each seed's run at the chosen point; the trial itself is that of seed 0.

        Raises:
            Diverged: at the chosen point one of them diverged.
        """
        folders = [best.folder]
        for seed in range(1, self._config.seeds):
            run = settings_of(self._config, method, best.point, seed, f"{method}-seed-{seed}")
            try:
                folders.append(self._run(run))
            except Diverged as error:
                raise Diverged(
                    f"{run.output.name} diverged at the chosen {json.dumps(best.point)}: give --seeds {seed}, or "
                    f"another --output and a --grid without this point ({error})"
                ) from error
        return folders

    def _run(self, run: Config) -> Path:
        self._started += 1
        return run_once(
            run, Series(f"run {self._started} of {self._count}: {run.output.name}", self._baseline)
        )


def _chosen(choice: Choice) -> str:
    """Return the chosen point in words, and the learning rate that follows from it."""
    shown = choice.best.point | {"lr": choice.best.lr}
    return ", ".join(f"{name} {value:.3g}" for name, value in shown.items())


def _described(choice: Choice) -> dict[str, Any]:
    trials = [
        {"point": t.point, "lr": t.lr, "run": t.folder.name}
        | {"validation": t.score if math.isfinite(t.score) else None}
        for t in choice.trials
    ]
    return {"trials": trials, "chosen": choice.best.point, "lr": choice.best.lr, "why": choice.why}
