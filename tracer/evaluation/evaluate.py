"""The command ``evaluate``: from its settings to scores and their file."""

from __future__ import annotations

import json
from pathlib import Path

from tracer.data.decoded import DecodedPictures
from tracer.data.loader import announce, choose
from tracer.data.names import note
from tracer.errors import UserError
from tracer.evaluation.config import EvaluateConfig
from tracer.evaluation.recognise import check_eval_data, check_prompts, read_sets
from tracer.evaluation.record import digest_of_start, head, run_of, sentences
from tracer.evaluation.scores import Scores, finite, incomplete
from tracer.evaluation.zero_shot import evaluate_sets
from tracer.files import check_output, whole_file, write_json
from tracer.machine import compute_device, resolve_precision
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
    refuse_nothing(config.eval_data)
    check_eval_data(config.eval_data)
    check_model(config.model, config.pretrained)
    choose(config, compute_device())  # refuses a loader that is missing
    run = run_of(config.pretrained)
    sets = read_sets(config.eval_data, config, config.classes, templates=config.prompt_template, run=run)
    for text in sentences(sets):
        note(text)
    check_prompts(sets, config.model, config.pretrained)
    clip = load_clip(config.model, config.pretrained)
    for each in sets:
        announce(each.index, clip.picture_format, config, compute_device())
    weights = {"model": digest_of_start(config.model, config.pretrained, clip.model.state_dict())}
    clip.model.to(compute_device())
    scored = evaluate_sets(
        clip,
        sets,
        workers=config.workers,
        decoded=DecodedPictures(0, config),
        max_bad=config.max_bad,
        precision=resolve_precision(config.precision),
    )
    scores = {name: finite(each.score) for name, each in scored.items()}
    if config.output:
        content = head("evaluation", clip.name, weights, sets) | {"scores": scores}
        try:
            with whole_file(config.output, may_replace=_is_scores) as part:
                part.write_text(markdown(scores)) if _is_markdown(config.output) else write_json(
                    part, content
                )
        except (OSError, UserError):
            print(json.dumps(scores, indent=1))  # they took long
            raise
    return scores


def refuse_nothing(eval_data: dict[str, Path]) -> None:
    """Raise UserError if a command that cannot do without evaluation sets has none."""
    if not eval_data:
        raise UserError("there is nothing to evaluate on: give --eval_data.NAME PATH at least once")


HEADER = "| set | pictures | accuracy | top-5 | macro-F1 | ECE | ECE if perfect | ECE, published code |"


def markdown(scores: Scores) -> str:
    """Return the scores as tables in Markdown, in per cent, with 95 % intervals; incomplete sets are marked."""
    classes = [HEADER, "|---" + "|---:" * 7 + "|"]
    captions = ["| set | pictures | image→text R@1 | R@5 | R@10 | text→image R@1 | R@5 | R@10 |", classes[1]]
    keys = ("accuracy", "top5", "macro_f1", "ece", "ece_perfect", "ece_published")
    recalls = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    for name, score in scores.items():
        lines, columns = (classes, keys) if "accuracy" in score else (captions, recalls)
        mark = f" (incomplete: {incomplete(score)})" if incomplete(score) else ""
        cells = [f"{name}{mark}", f"{score['pictures']:,}", *(_cell(score, key) for key in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    tables = ["\n".join(lines) for lines in (classes, captions) if len(lines) > 2]
    return "\n\n".join(tables) + "\n"


def _cell(score: dict, key: str) -> str:
    if key not in score:
        return "–"
    low, high = score.get(f"{key}_low"), score.get(f"{key}_high")
    known = "" if low is None or high is None else f" ({100 * low:.1f}–{100 * high:.1f})"
    return f"{100 * score[key]:.1f}{known}"


def _is_markdown(path: Path) -> bool:
    return path.suffix.lower() == ".md"


def _is_scores(path: Path) -> bool:
    """Return whether ``path`` is a file that this command wrote, which it may replace."""
    try:
        text = path.read_text()
        if _is_markdown(path):
            return text.startswith(HEADER[:18])
        return json.loads(text).get("kind") == "evaluation"
    except (OSError, ValueError, AttributeError, TypeError):
        return False
