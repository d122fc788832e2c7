"""What a comparison reads before it trains and writes when it is done: its data, its results and its report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import time
from pathlib import Path
from typing import Any

import yaml

from tracer.demo.benchmark import HOME, prepare
from tracer.demo.config import ICONS, DemoConfig, SweepConfig
from tracer.demo.judge import Judge, Rows
from tracer.demo.runs import VALIDATION
from tracer.errors import UserError
from tracer.evaluation.evaluate import refuse_nothing
from tracer.evaluation.recognise import check_eval_data, read_sets
from tracer.evaluation.record import digest_of_start, head
from tracer.evaluation.sets import EvaluationSet
from tracer.files import whole_file, write_json
from tracer.machine import machine, versions
from tracer.models.choice import choose_model
from tracer.models.clip import Clip
from tracer.models.registry import registered_model
from tracer.report.page import write_report
from tracer.report.results import read_results
from tracer.report.terminal import print_results
from tracer.train.cautions import cautions_of_sizes
from tracer.train.identity import training_index


def described(config: SweepConfig, judge: Judge, clock: Clock, title: str, command: str) -> dict[str, Any]:
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


def command_line(config: SweepConfig) -> str:
    """Return the command that repeats this comparison, with the settings that differ from the defaults."""
    options, defaults = [], type(config)()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == getattr(defaults, field.name):
            continue
        items = value.items() if isinstance(value, dict) else [("", value)]
        for key, item in items:
            option = f"--{field.name}.{key}" if key else f"--{field.name}"
            options.append(f"{shlex.quote(option)} {shlex.quote(_as_text(item))}")
    given = " ".join(options)
    if not isinstance(config, DemoConfig):
        return f"tracer sweep {given}".rstrip()
    quoted = shlex.quote(given) if set(given) & set('"$`\\') else f'"{given}"'
    return f"make demo ARGS={quoted}" if given else "make demo"


def _as_text(value: Any) -> str:
    """Return a setting as the command line takes it."""
    if isinstance(value, tuple | list):
        return yaml.safe_dump(list(value), default_flow_style=True, width=math.inf).strip()
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def prepare_data(config: SweepConfig) -> tuple[SweepConfig, list[EvaluationSet]]:
    """Return the settings with every default filled in, and the evaluation sets with the prompts of their classes.

    Raises:
        UserError: the settings name no evaluation set, or data that cannot be read or classified.
    """
    if config.train_data == ICONS / "train.csv":
        config = _with_icons(config)
        config.validate()  # again, now that the sets have names
    refuse_nothing(config.eval_data)
    check_eval_data(config.eval_data)
    if config.validation is not None:
        check_eval_data({VALIDATION: config.validation})
    pictures = training_index(config)
    sets = read_sets(config.eval_data, config, config.classes, pictures, config.prompt_template)
    captioned = next((each.name for each in sets if each.retrieval), None)
    if captioned:
        raise UserError(
            f"'{captioned}' has captions and no labels: methods are compared by classification, so label its "
            f"pictures or leave --eval_data.{captioned} out"
        )
    return config.resolve(len(pictures)), sets


def _with_icons(config: SweepConfig) -> SweepConfig:
    """Prepare the icon benchmark and fill in its sets, unless the user named others.

    Settings are chosen on a part of the in-distribution test pictures, and tested on the rest of them.
    """
    benchmark = prepare(ICONS, workers=config.workers)
    sets = {name: benchmark.rest if name == HOME else path for name, path in benchmark.eval_data.items()}
    return dataclasses.replace(
        config,
        validation=config.validation or benchmark.validation,
        eval_data=config.eval_data or sets,
        kinds=config.kinds or benchmark.roles,
        classes=config.classes or (None if config.prompt_template else benchmark.classes),
    )


def validation_set(config: SweepConfig, sets: list[EvaluationSet]) -> EvaluationSet:
    """Read the validation set, which holds no picture of the training or of a test.

    Args:
        config: of the comparison, with its data.
        sets: of the tests.

    Raises:
        UserError: it cannot be read or scored, or holds such a picture.
    """
    assert config.validation is not None  # validate() or prepare_data has seen to it
    training = training_index(config)
    try:
        read = read_sets(
            {VALIDATION: config.validation}, config, config.classes, training, config.prompt_template
        )
    except UserError as error:
        raise UserError(str(error).replace(f"--eval_data.{VALIDATION}", "--validation")) from error
    own = read[0]
    if len(read) > 1:
        raise UserError(
            f"--validation '{config.validation}' holds several sets: choose one, as in {config.validation}:id_val"
        )
    if own.retrieval:
        raise UserError(
            "--validation has captions and no labels: methods are compared by classification, so label them"
        )
    known = {os.path.abspath(str(image)) for image in own.index.images}
    for option, index in [
        ("train_data", training),
        *((f"eval_data.{each.name}", each.index) for each in sets),
    ]:
        shared = next((str(image) for image in index.images if os.path.abspath(str(image)) in known), None)
        if shared:
            raise UserError(
                f"'{shared}' is in --validation and in --{option}: a choice by pictures of the training or of a "
                "test says nothing, so divide them"
            )
    return own


def method_row(key: str, name: str, note: str, runs: Rows, variant_of: str | None = None) -> dict[str, Any]:
    """Return a method as results.json holds it."""
    return {"key": key, "name": name, "note": note, "runs": runs, "variant_of": variant_of}


def describe_start(config: SweepConfig, clip: Clip) -> dict[str, Any]:
    """Return the model that every method starts from."""
    model, pretrained = choose_model(config.model, config.pretrained)
    return {
        "model": clip.name,
        "pretrained": pretrained or ("shipped with tracer" if registered_model(model) else "its own weights"),
        "parameters": sum(p.numel() for p in clip.model.parameters()),
    }


def describe_domains(config: SweepConfig, sets: list[EvaluationSet]) -> Rows:
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
