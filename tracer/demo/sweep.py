"""The protocol of a fair comparison: the same trials for every method, chosen by validation in distribution alone.

Every method is trained once for each point of a declared grid. The trial with the best validation accuracy decides
its settings; the other seeds are trained with them. Only then are the test sets read, once for each chosen model.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from tracer.demo.compare import Clock, describe_domains, described, method_row, prepare_data, report
from tracer.demo.config import SweepConfig
from tracer.demo.judge import Judge, Weights, finished_run, scored_row
from tracer.demo.methods import run_once
from tracer.errors import UserError
from tracer.evaluation.fisher import fisher_information
from tracer.evaluation.recognise import read_sets
from tracer.evaluation.scores import Scored, Scores, difference, finite, numbers_alone
from tracer.evaluation.sets import EvaluationSet
from tracer.evaluation.zero_shot import classifier
from tracer.files import check_folder, claim_folder, whole_file, write_json
from tracer.models.architecture import Form, one_form
from tracer.models.choice import STUDENT, check_model
from tracer.models.soups import fisher_weighted, greedy, uniform
from tracer.train.baselines import BASELINES
from tracer.train.config import Config
from tracer.train.run import training_index

VALIDATION = "validation"
DECLARED = "declared.json"  # what the trials are, written before the first of them
MEASURES = ("accuracy", "ece")

Point = dict[str, Any]  # settings of a trial, by their names


class Trial(NamedTuple):
    """A run of a method at one point of the grid, and its accuracy on the validation set."""

    point: Point
    folder: Path
    accuracy: float


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
    check_folder(config.output)
    check_model(config.model, config.pretrained)
    config, sets = prepare_data(config)
    validation = _validation_set(config, sets)
    claim_folder(config.output)
    _declare(config)
    clock.lap("data")
    choices = {method: choose(_trials(config, method)) for method in config.methods}
    seeds = {method: _seeds(config, method, choice.best) for method, choice in choices.items()}
    clock.lap("training")
    judge = Judge.of(config, sets)
    results = Tested(config, judge, seeds).results()
    results |= {"soups": _soups(config, dataclasses.replace(judge, sets=[validation]), judge, choices)}
    clock.lap("evaluation")
    results |= {
        "examples": [],
        "choices": {method: _described(choice) for method, choice in choices.items()},
    }
    title, command = (
        "Robust fine-tuning, each method at its best setting",
        f"tracer sweep --output {config.output}",
    )
    return report(described(config, judge, clock, title, command) | results, config.output)


def points(grid: dict[str, list[Any]]) -> list[Point]:
    """Return every combination of the grid's values, in the order in which they are declared."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def settings_of(config: SweepConfig, method: str, point: Point, seed: int, name: str) -> Config:
    """Return the settings of a run: those of all, the method's, and the point's.

    ``lr_times`` multiplies the rate that the method has without it: its published one, or --lr.
    """
    common = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}
    changes = {name: value for name, value in point.items() if name != "lr_times"}
    own: Point = {"baseline": method, "seed": seed, "output": config.output / name}
    own |= {"eval_data": {VALIDATION: config.validation}}
    run = Config(**common | own)
    if run.adapted:
        run.lr = config.adapter_lr
    if "lr_times" in point:
        run.lr = run.recipe.lr * point["lr_times"]
    return dataclasses.replace(run, **changes)


def choose(trials: list[Trial]) -> Choice:
    """Return the trial with the best validation accuracy, of equal ones the first, and the reason in words."""
    best = max(trials, key=lambda trial: trial.accuracy)  # the first of equal ones
    others = sorted((t.accuracy for t in trials if t is not best), reverse=True)
    second = f", the next {100 * others[0]:.1f} %" if others else ""
    why = f"best of {len(trials)} trials on the validation set: {100 * best.accuracy:.1f} %{second}"
    return Choice(trials, best, why)


def _validation_set(config: SweepConfig, sets: list[EvaluationSet]) -> EvaluationSet:
    """Read the validation set, which must hold no test picture."""
    assert config.validation is not None  # validate() or prepare_data has seen to it
    (own,) = read_sets(
        {VALIDATION: config.validation},
        config,
        config.classes,
        training_index(config),
        config.prompt_template,
    )
    known = set(map(str, own.index.images))
    for each in sets:
        shared = next((str(image) for image in each.index.images if str(image) in known), None)
        if shared:
            raise UserError(
                f"'{shared}' is in --validation and in --eval_data.{each.name}: a choice by test pictures says "
                "nothing, so divide them"
            )
    return own


def _declare(config: SweepConfig) -> None:
    """Write down the grid before the first trial, and refuse another one in the same folder."""
    path, declared = config.output / DECLARED, {"grid": config.grid}
    if path.is_file():
        before = json.loads(path.read_text())
        if before != declared:
            raise UserError(
                f"the grid of '{config.output}' was {json.dumps(before['grid'])} and is now "
                f"{json.dumps(config.grid)}: all methods must get the same trials, so give another --output, or "
                "the grid of before"
            )
        return
    with whole_file(path) as part:
        write_json(part, declared)


def _trials(config: SweepConfig, method: str) -> list[Trial]:
    trials = []
    for number, point in enumerate(points(config.grid)):
        run = settings_of(config, method, point, 0, f"{method}-trial-{number}")
        folder = run_once(run)
        scores = json.loads((folder / "metrics.json").read_text())["scores"]["student"]
        trials.append(Trial(point, folder, scores[VALIDATION]["accuracy"]))
    return trials


def _seeds(config: SweepConfig, method: str, best: Trial) -> list[Path]:
    """Return the folder of each seed's run at the chosen point; the trial itself is that of seed 0."""
    runs = [best.folder]
    for seed in range(1, config.seeds):
        runs.append(run_once(settings_of(config, method, best.point, seed, f"{method}-seed-{seed}")))
    return runs


def _described(choice: Choice) -> dict[str, Any]:
    trials = [{"point": t.point, "run": t.folder.name, "validation": t.accuracy} for t in choice.trials]
    return {"trials": trials, "chosen": choice.best.point, "why": choice.why}


class Tested:
    """The test scores of what was chosen: each method and seed along the line from the start, read once.

    Args:
        config: of the sweep.
        judge: scores weights on the test sets.
        seeds: method → the folder of each seed's run.
    """

    def __init__(self, config: SweepConfig, judge: Judge, seeds: dict[str, list[Path]]) -> None:
        self._config, self._judge = config, judge
        start = judge.baseline()
        self._seeds, self._start = seeds, start
        self._at: dict[tuple[str, float], list[dict[str, Scored]]] = {}
        alphas = sorted({*config.alphas, config.wise_alpha} - {0.0, 1.0})
        for method, folders in seeds.items():
            ends = [(load_file(folder / STUDENT), judge.form_of(folder)) for folder in folders]
            self._at[method, 0.0] = [start] * len(folders)
            self._at[method, 1.0] = [judge.scored(*end) for end in ends]
            for alpha in alphas:
                weights = partial(judge.interpolated, alpha=alpha)
                self._at[method, alpha] = [judge.scored(weights(f), judge.form_of(f)) for f in folders]

    def results(self) -> dict[str, Any]:
        """Return the parts of results.json that the tests fill: methods, lines, and paired differences."""
        rows = [method_row("zero-shot", "Zero-shot", "no training", [scored_row(_scores(self._start))])]
        for method, folders in self._seeds.items():
            runs = [finished_run(folder, seed) for seed, folder in enumerate(folders)]
            tested = zip(runs, self._at[method, 1.0], strict=True)
            runs = [run | {"eval": _scores(scored), "teacher_eval": None} for run, scored in tested]
            rows.append(method_row(method, BASELINES[method].title, "", runs))
        plain, alpha = self._plain, self._config.wise_alpha
        wise = [scored_row(_scores(s), seed) for seed, s in enumerate(self._at[plain, alpha])]
        rows.append(
            method_row("wise-ft", "WiSE-FT", f"{BASELINES[plain].title} and start, α = {alpha:g}", wise)
        )
        return {"methods": rows, "curves": [self._line(m) for m in self._seeds], "pairs": self._pairs()}

    @property
    def _plain(self) -> str:
        """The method that WiSE-FT averages with the start, and that others are compared with."""
        return next((m for m in ("flyp", "flyp-multi") if m in self._seeds), next(iter(self._seeds)))

    def _line(self, method: str) -> dict[str, Any]:
        line = sorted((alpha, scored) for (name, alpha), scored in self._at.items() if name == method)
        points = [
            {"alpha": alpha, "seed": seed, "eval": numbers_alone(_scores(scored))}
            for alpha, each in line
            for seed, scored in enumerate(each)
        ]
        points.sort(key=lambda p: (p["seed"], p["alpha"]))
        return {"key": method, "name": BASELINES[method].title, "points": points}

    def _pairs(self) -> list[dict[str, Any]]:
        """Return the paired differences of every method and of WiSE-FT, to the plain one and to WiSE-FT."""
        roles = {d["name"]: d["kind"] for d in describe_domains(self._config, self._judge.sets)}
        columns = {
            role: [n for n, r in roles.items() if r == role] for role in ("in-distribution", "shifted")
        }
        plain, wise = (self._plain, 1.0), (self._plain, self._config.wise_alpha)
        keys = {plain: self._plain, wise: "wise-ft"} | {(m, 1.0): m for m in self._seeds}
        pairs = []
        for other in (plain, wise):
            for one in keys:
                for role, names in columns.items() if one != other else ():
                    a, b = ([s[name] for s in self._at[k] for name in names] for k in (one, other))
                    for measure in MEASURES if names else ():
                        result = difference(a, b, measure)
                        if result:
                            pair = {
                                "one": keys[one],
                                "other": keys[other],
                                "column": role,
                                "measure": measure,
                            }
                            pairs.append(pair | result._asdict())
        return pairs


def _soups(
    config: SweepConfig, validation: Judge, judge: Judge, choices: dict[str, Choice]
) -> dict[str, dict[str, Any]]:
    """Return the soups of the trials of each method: uniform, greedy and Fisher-weighted, with their test scores.

    The greedy one is chosen, and the Fisher information measured, on the validation set.
    """
    if not config.soups:
        return {}
    soups: dict[str, dict[str, Any]] = {}
    for method, choice in choices.items():
        form = one_form({trial.folder.name: judge.form_of(trial.folder) for trial in choice.trials})
        models = [load_file(trial.folder / STUDENT) for trial in choice.trials]

        def validate(weights: Weights, form: Form = form) -> float:
            return validation.scores(weights, form)[VALIDATION]["accuracy"]

        mixed, chosen = greedy(models, validate, [trial.accuracy for trial in choice.trials])
        fishers = [_fisher(validation, model, form) for model in models]
        kinds = {"uniform": uniform(models), "greedy": mixed, "fisher": fisher_weighted(models, fishers)}
        soups[method] = {
            name: {
                "validation": validate(weights),
                "eval": numbers_alone(_scores(judge.scored(weights, form))),
            }
            for name, weights in kinds.items()
        }
        soups[method]["greedy"]["trials"] = [choice.trials[n].folder.name for n in chosen]
    return soups


def _fisher(validation: Judge, weights: Weights, form: Form) -> Weights:
    (own,) = validation.sets
    clip = validation.with_weights(weights, form)
    return fisher_information(clip, own.index, classifier(clip, own.prompts), workers=validation.workers)


def _scores(scored: dict[str, Scored]) -> Scores:
    return {name: finite(each.score) for name, each in scored.items()}
