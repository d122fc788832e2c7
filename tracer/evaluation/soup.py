"""The command ``soup``: one file of weights from those of several runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from tracer.data.decoded import DecodedPictures
from tracer.data.names import note
from tracer.errors import UserError
from tracer.evaluation.config import SoupConfig
from tracer.evaluation.fisher import fisher_information
from tracer.evaluation.recognise import check_eval_data, check_prompts, read_sets
from tracer.evaluation.record import run_of
from tracer.evaluation.sets import EvaluationSet
from tracer.evaluation.zero_shot import classifier, evaluate_sets
from tracer.files import check_output
from tracer.machine import compute_device
from tracer.models.architecture import Architecture, Form, first_difference, one_form, saved_architecture
from tracer.models.choice import STUDENT, choose_model
from tracer.models.clip import Clip, load_clip
from tracer.models.heads import load_state
from tracer.models.soups import Weights, fisher_weighted, greedy, uniform
from tracer.models.weights import save_weights

VALIDATION = "validation"


def soup(config: SoupConfig) -> Path:
    """Write the soup of the weights that ``config`` names, and return the path of the file.

    Raises:
        UserError: the weights are of different architectures or forms, or the validation set cannot be scored.
    """
    config.validate()
    check_output(config.output)
    files = [_file_of(run) for run in config.runs]
    architecture = _common_architecture(files)
    _check_starts(config.runs)
    sets = _validation(config)
    check_prompts(sets, "auto", str(files[0]))
    models = [load_file(file) for file in files]
    try:
        mixed = uniform(models) if config.kind == "uniform" else _mixed(config, sets, files, models)
    except ValueError as error:
        raise UserError(str(error)) from error
    save_weights(mixed, config.output, architecture.metadata())
    return config.output


def _file_of(run: Path) -> Path:
    file = choose_model("auto", str(run)).pretrained
    if file is None or not Path(file).is_file():
        raise UserError(f"'{run}' does not exist: give folders of runs, or files of weights")
    return Path(file)


def _common_architecture(files: Sequence[Path]) -> Architecture:
    """Return the architecture and form of all files, which their headers describe; no weights are read."""
    forms: dict[str, Form] = {}
    first = None
    for file in files:
        saved = saved_architecture(file)
        if saved is None:
            raise UserError(
                f"'{file}' does not say its model: give runs, or files of weights that tracer wrote"
            )
        first = first or saved
        if difference := first_difference(saved, first.model, first.config):
            told = difference.replace(" in the model", f" in '{files[0]}'").replace("the file", f"'{file}'")
            raise UserError(f"a soup mixes weights of one architecture: {told}")
        if saved.form is not None:
            forms[str(file)] = saved.form
    assert first is not None  # validate() has counted them
    return replace(first, form=one_form(forms)) if forms else first


def _check_starts(runs: Sequence[Path]) -> None:
    """Refuse runs that began at different weights, whose mean is no model; a file does not say its start."""
    starts: dict[str, Path] = {}
    for run in runs:
        about = run / "run.json"
        if about.is_file():
            starts.setdefault(json.loads(about.read_text())["weights"]["zero-shot"], run)
    if len(starts) > 1:
        one, other = list(starts.values())[:2]
        raise UserError(
            f"'{one}' and '{other}' began at different weights, so that their mean is no model: mix runs of one "
            f"start, or name the files, such as {one / STUDENT}, if it is the same in two forms"
        )


def _validation(config: SoupConfig) -> list[EvaluationSet]:
    """Return the validation set alone; none for a kind that needs none."""
    if config.kind == "uniform" or config.validation is None:
        return []
    data = {VALIDATION: config.validation}
    check_eval_data(data)
    run = run_of(str(config.runs[0]))
    try:
        sets = read_sets(data, config, config.classes, templates=config.prompt_template, run=run)
    except UserError as error:
        raise UserError(str(error).replace(f"--eval_data.{VALIDATION}", "--validation")) from error
    if len(sets) > 1 or sets[0].retrieval:
        raise UserError(f"--validation '{config.validation}' must be one set of labelled pictures")
    return sets


def _mixed(
    config: SoupConfig, sets: list[EvaluationSet], files: Sequence[Path], models: Sequence[Weights]
) -> Weights:
    """Return the greedy or the Fisher-weighted soup."""
    clip = load_clip("auto", str(files[0]))
    clip.model.to(compute_device())
    if config.kind == "fisher":
        return fisher_weighted(models, [_fisher(clip, sets[0], model, config.workers) for model in models])
    decoded = DecodedPictures(loading=config)

    def validate(weights: Weights) -> float:
        load_state(clip.model, weights)
        scored = evaluate_sets(clip, sets, workers=config.workers, decoded=decoded, max_bad=config.max_bad)
        score = scored[VALIDATION].score
        return score[score["measure"]]

    mixed, chosen = greedy(models, validate)
    names = ", ".join(str(config.runs[n]) for n in chosen)
    note(f"the greedy soup holds {names}; its {sets[0].measure} on --validation is {validate(mixed):.4f}")
    return mixed


def _fisher(clip: Clip, own: EvaluationSet, weights: Weights, workers: int) -> Weights:
    load_state(clip.model, weights)
    return fisher_information(clip, own.index, classifier(clip, own.prompts), workers=workers)
