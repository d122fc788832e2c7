"""The command ``evaluate``: from its settings to scores and their file."""

from __future__ import annotations

import json
from pathlib import Path

from tracer.data.check import check_pictures
from tracer.data.index import Index, read_index
from tracer.errors import UserError
from tracer.evaluation.config import EvaluateConfig
from tracer.evaluation.prompts import check_distinct, check_labelled, check_labels, class_prompts
from tracer.evaluation.zero_shot import Scores, evaluate_zero_shot
from tracer.files import whole_file
from tracer.machine import compute_device
from tracer.models.clip import load_clip


def evaluate(config: EvaluateConfig) -> Scores:
    """Return the scores of the model and the sets that ``config`` names, and write them as JSON if asked.

    Raises:
        UserError: a setting, a data set or the model cannot be used; the message names the remedy.
    """
    config.validate()
    sets = evaluation_sets(config.eval_data)
    classes = sorted({label for index in sets for label in index.classes})
    prompts = class_prompts(config.classes, classes)
    check_labels(sets, prompts)
    if config.check_images:
        for index in sets:
            check_pictures(index, config.cache, config.workers)
    clip = load_clip(config.model, config.pretrained)
    check_distinct(prompts, clip.tokenizer)
    clip.model.to(compute_device())
    scores = evaluate_zero_shot(clip, sets, prompts, workers=config.workers)
    if config.output:
        with whole_file(config.output) as part:
            part.write_text(json.dumps(scores, indent=1, allow_nan=False))
    return scores


def evaluation_sets(eval_data: dict[str, Path]) -> list[Index]:
    """Read the evaluation sets of a command that cannot do without them.

    Raises:
        UserError: there are none, or one cannot be read or has pictures without a label.
    """
    if not eval_data:
        raise UserError(
            "there is nothing to evaluate on: give --eval_data.NAME=<csv or folder> at least once"
        )
    sets = [read_index(path, name) for name, path in eval_data.items()]
    check_labelled(sets)
    return sets
