"""The demo's comparison: prepare the data, train every method, score every model, report."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tracer.demo.benchmark import HOME, prepare
from tracer.demo.config import ICONS, DemoConfig, SweepConfig
from tracer.demo.judge import Judge, Rows, choose_examples, finished_run, scored_row
from tracer.demo.methods import METHODS, TRAINED_VARIANTS, Runs, train_all
from tracer.errors import UserError
from tracer.evaluation.evaluate import refuse_nothing
from tracer.evaluation.recognise import check_eval_data, read_sets
from tracer.evaluation.record import digest_of_start, head
from tracer.evaluation.scores import Scores, finite, numbers_alone
from tracer.evaluation.sets import EvaluationSet
from tracer.files import check_folder, claim_folder, whole_file, write_json
from tracer.machine import machine, versions
from tracer.models.choice import check_model, choose_model
from tracer.models.clip import Clip, load_clip
from tracer.models.registry import registered_model
from tracer.report.page import write_report
from tracer.report.results import read_results
from tracer.report.terminal import print_results
from tracer.train.cautions import cautions_of_sizes
from tracer.train.run import adapt, training_index

AnyDemo = TypeVar("AnyDemo", bound=DemoConfig)


def demo(config: DemoConfig) -> Path:
    """Prepare the data, train and score every method, write the report, and return its path.

    Raises:
        UserError: anything in the settings or the data that the user can mend.
    """
    clock = Clock()
    config.validate()
    command = command_line(config)
    check_folder(config.output)  # before the work, which takes long
    check_model(config.model, config.pretrained)
    config, sets = prepare_data(config)
    refuse_unadaptable(config)  # before the training, which takes long
    claim_folder(config.output)
    clock.lap("data")
    judge = Judge.of(config, sets)
    baseline = judge.baseline()
    runs = train_all(config, baseline)
    clock.lap("training")
    start = {name: finite(each.score) for name, each in baseline.items()}
    methods, curves = score_all(config, runs, judge, start)
    examples = choose_examples(judge, {key: runs[key][0] for key in METHODS})
    clock.lap("evaluation")
    results = {"methods": methods, "curves": curves, "examples": examples}
    about = described(config, judge, clock, "Robust fine-tuning, compared", command)
    return report(about | results, config.output)


def described(config: DemoConfig, judge: Judge, clock: Clock, title: str, command: str) -> dict[str, Any]:
    """Return what the results of every comparison say beside their numbers.

    Args:
        config: settings of the comparison.
        judge: of its evaluation sets.
        clock: of its parts.
        title: of the report.
        command: that repeats it.
    """
    weights = {"zero-shot": digest_of_start(config.model, config.pretrained, judge.start)}
    return {
        **head("comparison", judge.clip.name, weights, judge.sets),
        "title": title,
        "command": command,
        "start": describe_start(config, judge.clip),
        "domains": describe_domains(config, judge.sets),
        "notices": cautions_of_sizes(judge.sets),
        "settings": config.plain() | config.taken(),
        "versions": versions(),
        "machine": machine(),
        "times": clock.laps | {"total": clock.total()},
    }


def command_line(config: DemoConfig) -> str:
    """Return the command that repeats this comparison, with the settings that differ from the defaults."""
    options = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == getattr(DemoConfig(), field.name):
            continue
        items = value.items() if isinstance(value, dict) else [("", value)]
        for key, item in items:
            if isinstance(item, tuple | list | bool):
                text = json.dumps(item)
            else:
                text = "null" if item is None else str(item)
            option = f"--{field.name}.{key}" if key else f"--{field.name}"
            options.append(f"{shlex.quote(option)} {shlex.quote(text)}")
    return f'make demo ARGS="{" ".join(options)}"' if options else "make demo"


def prepare_data(config: AnyDemo) -> tuple[AnyDemo, list[EvaluationSet]]:
    """Return the settings with every default filled in, and the evaluation sets with the prompts of their classes.

    Raises:
        UserError: the settings name no evaluation set, or data that cannot be read or classified.
    """
    if config.train_data == ICONS / "train.csv":
        config = _with_icons(config)
        config.validate()  # again, now that the sets have names
    refuse_nothing(config.eval_data)
    check_eval_data(config.eval_data)
    pictures = training_index(config)
    sets = read_sets(config.eval_data, config, config.classes, pictures, config.prompt_template)
    captioned = next((each.name for each in sets if each.retrieval), None)
    if captioned:
        raise UserError(
            f"'{captioned}' has captions and no labels: the demo compares classification, so label its pictures "
            f"or "
            f"leave --eval_data.{captioned} out"
        )
    return config.resolve(len(pictures)), sets


def _with_icons(config: AnyDemo) -> AnyDemo:
    """Prepare the icon benchmark and fill in its sets, unless the user named others.

    A sweep is validated on a part of the in-distribution test pictures, and tested on the rest of them.
    """
    benchmark = prepare(ICONS, workers=config.workers)
    sets = benchmark.eval_data
    if isinstance(config, SweepConfig):
        sets = {name: benchmark.rest if name == HOME else path for name, path in sets.items()}
        config = dataclasses.replace(config, validation=config.validation or benchmark.validation)
    return dataclasses.replace(
        config,
        eval_data=config.eval_data or sets,
        kinds=config.kinds or benchmark.roles,
        classes=config.classes or (None if config.prompt_template else benchmark.classes),
    )


def refuse_unadaptable(config: DemoConfig) -> None:
    """Raise UserError if the model cannot take the adapters that ``config`` describes."""
    adapt(config, load_clip(config.model, config.pretrained).model)


def score_all(config: DemoConfig, runs: Runs, judge: Judge, zero_shot: Scores) -> tuple[Rows, Rows]:
    """Return the methods and the curves over α, as results.json holds them; ``zero_shot``: the start's scores."""
    finished = {
        key: [finished_run(folder, seed) for seed, folder in enumerate(folders)]
        for key, folders in runs.items()
    }
    ends = {0.0: [scored_row(zero_shot, seed) for seed in range(config.seeds)]}
    wise = ends | {1.0: finished["flyp"]}
    for alpha in {*config.alphas, config.wise_alpha} - wise.keys():
        weights = partial(judge.interpolated, alpha=alpha)
        wise[alpha] = judge.rows(f"WiSE-FT, α = {alpha:g}", weights, runs["flyp"])
    scaled = ends | {config.adapter_alpha: finished["r-adapter"]}
    for alpha in {*config.alphas, 1.0} - scaled.keys():
        weights = partial(judge.folded, alpha=alpha)
        scaled[alpha] = judge.rows(f"R-Adapter, α = {alpha:g}", weights, runs["r-adapter"])

    methods = [method_row("zero-shot", "Zero-shot", "no training", [scored_row(zero_shot)])]
    methods += [method_row(key, m.name, m.note, finished[key]) for key, m in METHODS.items()]
    note = f"plain run and start averaged, α = {config.wise_alpha:g}"
    wise_ft = method_row("wise-ft", "WiSE-FT", note, wise[config.wise_alpha])
    methods.insert(-1, wise_ft)  # R-Adapter stays last, before its variants
    if config.ablate:
        methods += score_variants(config, runs, judge, finished, scaled[1.0])
    curves = [_curve("wise-ft", "WiSE-FT", wise), _curve("r-adapter", "R-Adapter", scaled)]
    return methods, curves


def score_variants(
    config: DemoConfig, runs: Runs, judge: Judge, finished: dict[str, Rows], unscaled: Rows
) -> Rows:
    """Return R-Adapter's variants: those that were trained, and those made of the full method's files.

    Args:
        unscaled: the full method's rows at α = 1.
    """
    variants = [
        method_row(key, m.name, m.note, finished[key], "r-adapter") for key, m in TRAINED_VARIANTS.items()
    ]
    last = partial(judge.folded, alpha=config.adapter_alpha, file="adapters_last")
    rows = judge.rows("R-Adapter, last", last, runs["r-adapter"])
    return [
        *variants,
        method_row("r-adapter-no-average", "R-Adapter, no accumulation", "the last step", rows, "r-adapter"),
        method_row("r-adapter-no-scaling", "R-Adapter, no re-scaling", "α = 1", unscaled, "r-adapter"),
    ]


def method_row(key: str, name: str, note: str, runs: Rows, variant_of: str | None = None) -> dict[str, Any]:
    """Return a method as results.json holds it."""
    return {"key": key, "name": name, "note": note, "runs": runs, "variant_of": variant_of}


def _curve(key: str, name: str, rows: dict[float, Rows]) -> dict[str, Any]:
    """Return points from the start (α = 0) to what was trained, made of α → a row for each seed."""
    points = [
        {"alpha": alpha, "seed": row["seed"], "eval": numbers_alone(row["eval"])}
        for alpha in rows
        for row in rows[alpha]
    ]
    return {"key": key, "name": name, "points": sorted(points, key=lambda p: (p["seed"], p["alpha"]))}


def describe_start(config: DemoConfig, clip: Clip) -> dict[str, Any]:
    """Return the model that every method starts from."""
    model, pretrained = choose_model(config.model, config.pretrained)
    return {
        "model": clip.name,
        "pretrained": pretrained or ("shipped with tracer" if registered_model(model) else "its own weights"),
        "parameters": sum(p.numel() for p in clip.model.parameters()),
    }


def describe_domains(config: DemoConfig, sets: list[EvaluationSet]) -> Rows:
    """Return the evaluation sets with their roles; by default the first is in-distribution, the others shifted."""
    return [
        {
            "name": each.name,
            "kind": config.kinds.get(each.name, "shifted" if n else "in-distribution"),
            "pictures": len(each.index),
            "expected": each.expected,
            "classes": len(each.index.classes),
            "chance": 1 / len(each.class_ids),
        }
        for n, each in enumerate(sets)
    ]


def report(results: dict[str, Any], folder: Path) -> Path:
    """Write ``results.json``, and from it the page, whose path is returned, and the table on the terminal."""
    path = folder / "results.json"
    with whole_file(path) as part:
        write_json(part, results)
    written = read_results(path)
    page = write_report(written, folder / "report.html")
    print_results(written)
    return page


class Clock:
    """Measures the seconds of a job's parts, one after the other."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._started = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End the part ``name``, which began with the clock or where the last part ended."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now

    def total(self) -> float:
        """Return the seconds since the clock was made."""
        return time.perf_counter() - self._started
