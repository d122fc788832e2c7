"""The command ``evaluate``: from its settings to scores and their file."""

from __future__ import annotations

import json
from pathlib import Path

from tracer.data.build import check_sources, read_index
from tracer.data.config import LoadingSettings
from tracer.data.decoded import DecodedPictures
from tracer.data.index import Index
from tracer.data.loader import announce, choose
from tracer.data.names import note
from tracer.errors import UserError
from tracer.evaluation.config import EvaluateConfig
from tracer.evaluation.prompts import (
    check_distinct,
    check_labelled,
    check_labels,
    named_alike,
)
from tracer.evaluation.record import classes_for, digest_of_start, head, run_of
from tracer.evaluation.zero_shot import Scores, evaluate_zero_shot
from tracer.files import check_output, whole_file, write_json
from tracer.machine import compute_device
from tracer.models.choice import check_model
from tracer.models.clip import load_clip


def evaluate(config: EvaluateConfig) -> Scores:
    """Return the scores of the model and the sets that ``config`` names, and write them as JSON if asked.

    Raises:
        UserError: a setting, a data set or the model cannot be used; the message names the remedy.
    """
    config.validate()
    if config.output and not _is_scores(config.output):
        check_output(config.output)  # before the work
    check_evaluation_data(config.eval_data)
    check_model(config.model, config.pretrained)
    choose(config, compute_device())  # refuses a loader that is missing
    sets = evaluation_sets(config.eval_data, config)
    classes = classes_for(config.classes, config.prompt_template, None, sets, run_of(config.pretrained))
    prompts = classes.prompts
    check_labels(sets, prompts)
    note(classes.sentence())
    clip = load_clip(config.model, config.pretrained)
    check_distinct(prompts, clip.tokenizer, named_alike(*sets))
    for index in sets:
        announce(index, clip.picture_format, config, compute_device())
    weights = digest_of_start(config.model, config.pretrained, clip.model.state_dict())
    clip.model.to(compute_device())
    scores = evaluate_zero_shot(
        clip,
        sets,
        prompts,
        workers=config.workers,
        decoded=DecodedPictures(0, config),
        max_bad=config.max_bad,
    )
    if config.output:
        try:
            with whole_file(config.output, may_replace=_is_scores) as part:
                write_json(
                    part, head("evaluation", clip.name, {"model": weights}, classes) | {"scores": scores}
                )
        except (OSError, UserError):
            print(json.dumps(scores, indent=1))  # they took long
            raise
    return scores


def _is_scores(path: Path) -> bool:
    """Return whether ``path`` is a file that this command wrote, which it may replace."""
    try:
        content = json.loads(path.read_text())
        return content.get("kind") == "evaluation"
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def check_evaluation_data(eval_data: dict[str, Path]) -> None:
    """Raise UserError if there is no evaluation set, or one does not exist."""
    if not eval_data:
        raise UserError("there is nothing to evaluate on: give --eval_data.NAME PATH at least once")
    check_sources(eval_data.values())


def evaluation_sets(eval_data: dict[str, Path], loading: LoadingSettings) -> list[Index]:
    """Read the evaluation sets of a command that cannot do without them.

    Raises:
        UserError: there are none, or one cannot be read or has pictures without a label.
    """
    check_evaluation_data(eval_data)
    sets = [read_index(path, name, loading) for name, path in eval_data.items()]
    check_labelled(sets)
    return sets
