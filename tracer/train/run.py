"""A fine-tuning run as a folder: its identity, its training, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from tracer.adapters import TOWERS, Share, add_adapters, save_adapters
from tracer.data.build import check_sources, read_index
from tracer.data.index import Index
from tracer.data.loader import announce, choose
from tracer.data.text import read_templates
from tracer.errors import UserError
from tracer.evaluation.prompts import check_distinct, check_labels, named_alike
from tracer.evaluation.record import classes_for, digest_of_start, head
from tracer.files import (
    aside,
    check_ours,
    check_output,
    is_marked,
    remove_tree,
    sync,
    whole_folder,
    write_json,
)
from tracer.machine import compute_device, resolve_precision, versions
from tracer.models.architecture import Architecture
from tracer.models.choice import check_model
from tracer.models.clip import load_clip, openai_templates, source_files
from tracer.models.freezing import freeze, lock_batchnorm, locked_buffers, trained_batchnorm
from tracer.models.towers import checkpoint_activations
from tracer.models.weights import digest_of, first_not_finite, save_weights
from tracer.train.cautions import caution_of_size, idle_options, resting_averages
from tracer.train.checkpoint import WHOLE, Checkpoints
from tracer.train.config import Config
from tracer.train.engine import deepspeed_settings
from tracer.train.log import StepLog, read_log
from tracer.train.loggers import check_loggers
from tracer.train.loop import Trained, train
from tracer.train.ranks import Ranks, check_batch_size, join, ranks
from tracer.train.scoring import BEST, Baseline, Evaluation, Scorer, Weights, whole_models

# Settings that say where and how fast a run works, and change nothing in its result.
WITHOUT_EFFECT = ("output", "save_every", "max_skipped", "max_bad", "cache", "cache_gb", "workers", "log_to")


@dataclass
class RunRecord:
    """What ``run.json`` keeps about a finished run.

    ``seconds`` counts all attempts. ``precision`` is the one used, never auto. ``sizes`` are in parameters and
    bytes. ``fingerprint`` is :func:`fingerprint` of the settings. ``notices`` are the sentences that were printed
    as warnings about the settings and the evaluation sets.
    """

    seconds: float
    precision: str
    sizes: dict[str, int]
    versions: dict[str, str]
    fingerprint: str
    notices: list[str]


class Series(NamedTuple):
    """What a run knows of the series of runs that it is part of.

    ``title`` stands in the bar; ``baseline`` has the scores of the start that the runs share.
    """

    title: str
    baseline: Baseline | None


def finetune(config: Config, series: Series | None = None) -> Path:
    """Fine-tune as ``config`` says, evaluate, and return the folder of the run.

    A run that was cut off goes on from its last checkpoint, and ends as if it had not been.

    Args:
        config: the settings.
        series: given where the settings are those of several methods, so that some have no effect on this run.

    Raises:
        UserError: anything in the settings or the data that the user can mend.
    """
    config.validate()
    with join(config.timeout).quiet():
        return _finetune(config, ranks(), series)


def _finetune(config: Config, here: Ranks, series: Series | None) -> Path:
    started = time.perf_counter()
    check_batch_size(config.batch_size, here.size)
    here.once(lambda: _check_folders(config.output))
    here.once(lambda: check_loggers(config.log_to))
    here.once(lambda: check_sources([config.train_data, *config.eval_data.values()]))
    here.once(lambda: check_model(config.model, config.pretrained))
    choose(config, compute_device())  # refuses a loader that is missing
    # The data first: most mistakes are made there. One rank builds an index, the others find it in the cache.
    index = here.leaders_first(lambda: training_index(config))
    evaluation = here.agree(lambda: _read_evaluation(config, index) if here.first else None)
    here.agree(lambda: deepspeed_settings(config))
    config = config.resolve(len(index))
    notices = here.once(lambda: _notices(config, evaluation, series))
    torch.manual_seed(config.seed)  # for random initial weights, and for adapters of a given rank
    clip = here.leaders_first(lambda: load_clip(config.model, config.pretrained))
    if evaluation and evaluation.classes:
        check_distinct(evaluation.classes.prompts, clip.tokenizer, named_alike(index, *evaluation.sets))
    start = {name: value.clone() for name, value in clip.model.state_dict().items()}
    prepare(config, clip.model)
    identity = here.once(lambda: fingerprint(config))
    with ExitStack() as stack:
        folder = here.agree(lambda: _claim(config.output, stack, here))
        checkpoints = here.agree(lambda: Checkpoints(folder, decisive(config), identity, started))
        if checkpoints.step:
            tqdm.write(f"'{folder}': going on after step {checkpoints.step} of {config.steps}")
        with here.agree(lambda: start_log(config, folder if here.first else None, checkpoints.step)) as log:
            log.skipped, log.skipped_in_a_row = here.once(lambda: [log.skipped, log.skipped_in_a_row])
            if here.first:
                announce(index, clip.picture_format, config, compute_device())
                (folder / "config.yaml").write_text(config.to_yaml())
                note_start(config, index, evaluation, here)
            scorer = None
            if evaluation:
                scorer = Scorer(config, evaluation, start, folder, series.baseline if series else None)
                scorer.remember(read_log(folder))
            title = series.title if series else config.output.name
            trained = train(config, clip, index, log, checkpoints, scorer, title)
        if not here.first:
            return config.output
        assert evaluation is not None  # this rank read it
        assert scorer is not None
        frozen = {n: start[n] for n in _frozen(clip.model)}
        name, architecture = clip.name, clip.architecture
        del clip  # frees the engine's weights, to which its model is tied
        weights = _export(config, _exact(trained, frozen), start, folder, name, architecture)
        if scorer.best:
            weights["best"] = load_file(folder / BEST)
        about = _head(config, name, weights, evaluation, start, folder)
        scores = scorer.scores(weights) if evaluation.sets else {}
        write_json(folder / "metrics.json", {**about, "kind": "metrics", "scores": scores})
        record = RunRecord(
            seconds=checkpoints.seconds,
            precision=resolve_precision(config.precision),
            sizes=trained.sizes | {f"{p.stem}_bytes": p.stat().st_size for p in folder.glob("*.safetensors")},
            versions=versions(),
            fingerprint=identity,
            notices=notices,
        )
        if config.adapted:
            _print_sizes(record.sizes)
        write_json(folder / "run.json", {**about, **asdict(record)})
        sync(folder)
    for checkpoint in config.output.glob("checkpoint-*"):
        if is_marked(checkpoint):
            remove_tree(checkpoint)
    return config.output


def _check_folders(output: Path) -> None:
    """Refuse a run that could not be written, before the work."""
    check_output(output)  # and what is beside it
    if os.path.lexists(aside(output)):
        check_ours(aside(output))


def _claim(output: Path, stack: ExitStack, here: Ranks) -> Path:
    """Return the folder in which the run is written until it is whole; the first rank makes and locks it."""
    return stack.enter_context(whole_folder(output, keep=WHOLE)) if here.first else aside(output)


def training_index(config: Config) -> Index:
    """Return the index of the training data, with the templates that ``config`` names."""
    index = read_index(config.train_data, None, config)
    if config.templates:
        templates = (
            openai_templates() if config.templates == "openai" else read_templates(Path(config.templates))
        )
        index = dataclasses.replace(index, templates=templates)
    return index


def _read_evaluation(config: Config, index: Index) -> Evaluation:
    """Return the evaluation sets with the prompts of the classes, which --classes or else the data names."""
    sets = [read_index(path, name, config) for name, path in config.eval_data.items()]
    if not sets:
        return Evaluation([], None)
    classes = classes_for(config.classes, config.prompt_template, index, sets)
    check_labels(sets, classes.prompts)
    return Evaluation(sets, classes)


def _notices(config: Config, evaluation: Evaluation | None, series: Series | None) -> list[str]:
    """Print what the user should know before the training, and return it."""
    sizes = [caution_of_size(index.name, len(index)) for index in (evaluation.sets if evaluation else ())]
    notices = [*([] if series else idle_options(config)), *resting_averages(config), *filter(None, sizes)]
    for text in notices:
        warnings.warn(text, stacklevel=2)
    return notices


def prepare(config: Config, model: nn.Module) -> None:
    """Add adapters, freeze, lock BatchNorm and switch activation checkpointing on, as ``config`` says.

    Raises:
        UserError: the model does not allow what the settings ask for; names the settings.
    """
    if config.adapted:
        tqdm.write(str(adapt(config, model)))
    freeze(model, config.freeze, config.freeze_image_blocks, config.freeze_text_blocks)
    if config.freezing:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        share = Share(trained, sum(p.numel() for p in model.parameters()))
        tqdm.write(str(share))
    lock_batchnorm(model, all_layers=config.lock_batchnorm)
    layer = trained_batchnorm(model)
    if layer is not None and ranks().size > 1:
        raise UserError(
            f"BatchNorm ('{layer}') would see the pictures of one rank alone: add --lock_batchnorm true"
        )
    if config.grad_checkpointing:
        if layer is not None:
            raise UserError(
                f"--grad_checkpointing true would move the statistics of BatchNorm ('{layer}') twice in each "
                "step: add --lock_batchnorm true"
            )
        checkpoint_activations(model)


def _frozen(model: nn.Module) -> list[str]:
    """Return the names of the parameters and statistics that training leaves as they were."""
    return [n for n, p in model.named_parameters() if not p.requires_grad] + locked_buffers(model)


def adapt(config: Config, model: nn.Module) -> Share:
    """Add the adapters that ``config`` describes, and return how many parameters they have.

    Raises:
        UserError: the model or the settings do not allow them; names the settings.
    """
    towers = TOWERS if config.adapter_towers == "both" else (config.adapter_towers,)
    try:
        return add_adapters(model, rank=config.adapter_rank, drop=config.adapter_drop, towers=towers)
    except ValueError as error:
        raise UserError(f"{error} (--adapter_towers, --adapter_rank, --method)") from error


def _exact(trained: Trained, frozen: Weights) -> Trained:
    """Return the trained weights with the ``frozen`` ones as they were: a bf16 engine has rounded them.

    Raises:
        UserError: weights are not finite, so that their accuracy would mean nothing.
    """
    exact = {}
    for name in ("student", "teacher", "last"):
        state = getattr(trained, name)
        if state is None:
            continue
        exact[name] = state | {n: v for n, v in frozen.items() if n in state}
        key = first_not_finite(exact[name])
        if key is not None:
            raise UserError(
                f"the {name}'s weights are not finite after training ('{key}'): they are neither scored nor "
                "kept; lower --lr or give a --clip_grad above 0"
            )
    return trained._replace(**exact)


def _export(
    config: Config, trained: Trained, start: Weights, folder: Path, model: str, architecture: Architecture
) -> dict[str, Weights]:
    """Write the trained weights to ``folder``, and return those of each whole model by the name of its file.

    Each file describes its ``architecture``. Adapters are written by themselves, with the name of their ``model``,
    and folded into the weights of ``start``.
    """
    weights = whole_models(config, start, trained.student, trained.teacher)
    if config.adapted:
        save_adapters(trained.student, folder / "adapters.safetensors", model)
        save_adapters(trained.last, folder / "adapters_last.safetensors", model)
    for name, state in weights.items():
        save_weights(state, folder / f"{name}.safetensors", architecture.metadata())
    return weights


def start_log(config: Config, folder: Path | None, after: int) -> StepLog:
    """Return the log of a run, with the loggers that its settings name."""
    return StepLog(folder, after, loggers=config.log_to, settings=config.plain() | config.taken())


def _head(
    config: Config,
    model: str,
    weights: dict[str, Weights],
    evaluation: Evaluation,
    start: Weights,
    folder: Path,
) -> dict[str, Any]:
    """Return what the files of results of a run begin with."""
    digests: dict[str, str | None] = {"zero-shot": digest_of_start(config.model, config.pretrained, start)}
    digests |= {name: digest_of(folder / f"{name}.safetensors") for name in weights}
    return head("run", model, digests, evaluation.classes)


def note_start(config: Config, index: Index, evaluation: Evaluation | None, here: Ranks) -> None:
    """Print what is about to be trained, on what, and for how long."""
    classes = f"{len(index.classes)} classes, " if index.classes else ""
    captions = len(index.columns.captions)
    pairs = config.total_steps * config.batch_size * config.accumulation
    method = config.method + (f" with a {config.teacher} teacher" if config.method == "tracer" else "")
    ranks_ = f" on {here.size} ranks" if here.size > 1 else ""
    tqdm.write(
        f"{method}: {len(index)} pictures, {classes}{captions or 'no'} captions; {config.total_steps} steps of "
        f"{config.batch_size * config.accumulation} pairs, {pairs / len(index):.3g} epochs; "
        f"{compute_device().type}{ranks_}, {resolve_precision(config.precision)}"
    )
    if evaluation and evaluation.classes:
        tqdm.write(f"evaluation: {evaluation.classes.sentence()}")


def _print_sizes(sizes: dict[str, int]) -> None:
    """Print what the run keeps: the optimizer's state, a checkpoint, and each file of weights."""
    files = ("adapters", "adapters_last", "student", "teacher")
    kept = {"optimizer state": sizes["optimizer_bytes"], "checkpoint": sizes["checkpoint_bytes"]}
    kept |= {f"{n}.safetensors": sizes[f"{n}_bytes"] for n in files if f"{n}_bytes" in sizes}
    tqdm.write(", ".join(f"{name} {size / 1e6:.3g} MB" for name, size in kept.items()))


def decisive(config: Config) -> dict[str, Any]:
    """Return the settings that decide a run's result."""
    settings = config.plain() | config.taken() | {"precision": resolve_precision(config.precision)}
    settings["loader"] = choose(config, compute_device())[0]
    return {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}


def fingerprint(config: Config) -> str:
    """Return a digest of all that decides a run's result: settings, versions, and the files that it reads."""
    index = training_index(config)
    settings = decisive(config.resolve(len(index)))
    files = [
        *source_files(config.model, config.pretrained),
        *filter(None, (config.classes, config.deepspeed)),
    ]
    content = [digest_of(path) for path in files if path.is_file()]
    data = [index.digest(), *(read_index(path, None, config).digest() for path in config.eval_data.values())]
    return hashlib.sha256(json.dumps([settings, content, data, versions()]).encode()).hexdigest()


def is_run_of(config: Config, folder: Path) -> bool:
    """Return whether ``folder`` holds a whole run with the settings, data, start and versions of ``config``."""
    whole = all((folder / name).is_file() for name in ("run.json", "metrics.json", "student.safetensors"))
    return whole and json.loads((folder / "run.json").read_text()).get("fingerprint") == fingerprint(config)
