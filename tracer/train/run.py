"""A fine-tuning run as a folder: its identity, its training, and what it leaves behind."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from tracer.adapters import TOWERS, Share, add_adapters, save_adapters
from tracer.data.batches import check_enough
from tracer.data.begun import keep
from tracer.data.build import check_sources
from tracer.data.index import Index
from tracer.data.loader import announce, choose
from tracer.errors import Diverged, Stopped, UserError
from tracer.evaluation.recognise import check_eval_data, check_prompts, read_sets
from tracer.evaluation.record import digest_of_start, head, sentences
from tracer.evaluation.sets import EvaluationSet, Prompts
from tracer.files import (
    aside,
    check_ours,
    check_output,
    digest_of,
    is_marked,
    remove_folder,
    remove_tree,
    sync,
    whole_file,
    whole_folder,
    write_json,
    write_tensors,
)
from tracer.machine import compute_device, resolve_precision, versions
from tracer.models.architecture import Architecture
from tracer.models.choice import check_model
from tracer.models.clip import Clip, contrast_of, load_clip
from tracer.models.freezing import freeze, lock_batchnorm, locked_buffers, trained_batchnorm
from tracer.models.heads import START_HEAD, head_state
from tracer.models.towers import checkpoint_activations
from tracer.models.weights import first_not_finite, save_weights
from tracer.train.cached import refuse_batch_statistics
from tracer.train.cautions import cautions_of_sizes, idle_options, missing_parts, resting_averages
from tracer.train.checkpoint import WHOLE, Checkpoints
from tracer.train.classifier import begin_classifier, check_classes, prompts_of_training
from tracer.train.config import Config
from tracer.train.engine import deepspeed_settings
from tracer.train.extras import add_baseline, check_extras
from tracer.train.identity import IDENTITY, INDEX, Identity, differences_from, identity_of, training_index
from tracer.train.log import StepLog, read_log
from tracer.train.loggers import check_loggers
from tracer.train.loop import Trained, objective, stopped_after, train
from tracer.train.ranks import Ranks, check_batch_size, check_mesh, join, ranks
from tracer.train.scoring import (
    BEST,
    Baseline,
    Scorer,
    Weights,
    trained_form,
    trained_from,
    whole_models,
    with_form_of,
)
from tracer.train.start import check_compiler, check_shared
from tracer.words import counted


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
    here = join(config.timeout)
    with here.quiet(), here.watched(config.heartbeat):
        return _finetune(config, here, series)


def _finetune(config: Config, here: Ranks, series: Series | None) -> Path:
    started = time.perf_counter()
    here.agree(lambda: check_batch_size(config.batch_size, here.size))
    here.agree(lambda: check_mesh(config.mesh_shape, here.size))
    here.agree(lambda: check_compiler(config))
    here.once(lambda: _check_folders(config))
    here.once(lambda: _check_names(config))
    choose(config, compute_device())  # refuses a loader that is missing
    # The data first: most mistakes are made there. One rank builds an index, the others find it in the cache.
    index = here.leaders_first(lambda: _read_training(config))
    sets = here.agree(lambda: _read_evaluation(config, index) if here.first else [])
    here.agree(lambda: deepspeed_settings(config))
    config = config.resolve(len(index))
    notices = here.once(lambda: _notices(config, sets, series))
    prompts = here.agree(lambda: _check_prompts(config, index, sets))
    torch.manual_seed(config.seed)  # for random initial weights, and for adapters of a given rank
    clip = here.leaders_first(lambda: load_clip(config.model, config.pretrained))
    here.agree(partial(begin_classifier, config, clip, index, prompts))
    asked, config = config, with_form_of(config, clip)
    start = {name: value.clone() for name, value in clip.model.state_dict().items()}
    notices += here.once(partial(_missing, config, clip.model))
    prepare(config, clip.model)
    with ExitStack() as stack:
        own = here.leaders_first(lambda: identity_of(asked, index))
        here.once(lambda: _claim(config.output, own, stack))
        first = Identity(**here.once(lambda: asdict(own)))
        here.agree(lambda: _check_alike(own, first, here))
        folder, identity = aside(config.output), own.digest()
        here.agree(lambda: check_shared(folder / IDENTITY, here.rank))
        here.once(lambda: keep(index, folder / INDEX, config.cache))
        checkpoints = Checkpoints(folder, identity, started, config.keep)
        if checkpoints.step:
            tqdm.write(f"'{folder}': going on after step {checkpoints.step} of {config.steps}")
        with here.agree(lambda: start_log(config, folder if here.first else None, checkpoints.step)) as log:
            log.skipped, log.skipped_in_a_row = here.once(lambda: [log.skipped, log.skipped_in_a_row])
            if here.first:
                announce(index, clip.picture_format, config, compute_device())
                (folder / "config.yaml").write_text(asked.to_yaml())
                note_start(config, index, sets, here)
            scorer = _scorer(config, sets, start, folder, series) if here.first else None
            title = series.title if series else config.output.name
            stack.enter_context(_saved_when_trained(checkpoints, config.total_steps))
            trained = train(config, clip, index, log, checkpoints, scorer, title)
        if scorer is None:  # another rank than the first
            return config.output
        began = trained_from(config, start)
        frozen = {n: began[n] for n in _frozen(clip.model)}
        name, architecture = clip.name, replace(clip.architecture, form=trained_form(config, clip))
        del clip  # frees the engine's weights, to which its model is tied
        weights = _export(config, _exact(trained, frozen), start, folder, name, architecture)
        if scorer.best:
            weights["best"] = load_file(folder / BEST)
        about = _head(config, name, weights, sets, start, folder)
        write_json(folder / "metrics.json", {**about, "kind": "metrics", "scores": scorer.scores(weights)})
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
    for unneeded in (config.output / INDEX, *config.output.glob("checkpoint-*")):
        if is_marked(unneeded):
            remove_tree(unneeded)
    return config.output


@contextmanager
def _saved_when_trained(checkpoints: Checkpoints, total: int) -> Iterator[None]:
    """Say of a signal that comes after the last step, while the first rank scores, that all is saved."""
    try:
        yield
    except Stopped as stopped:
        if stopped.together or checkpoints.step < total:
            raise
        raise Stopped(stopped_after(total, total), stopped.signal, saved=True) from None


def _check_folders(config: Config) -> None:
    """Refuse a run that could not be written, before the work; remove an unfinished one if --restart says so."""
    check_output(config.output)  # and what is beside it
    if os.path.lexists(part := aside(config.output)):
        check_ours(part)
        if config.restart:
            remove_folder(part)


def _check_alike(own: Identity, first: Identity, here: Ranks) -> None:
    """Refuse a rank that was started with other settings, data or versions than the first."""
    if differences := own.differences(asdict(first), ("on rank 0", "here")):
        raise UserError(
            f"rank {here.rank} on host {socket.gethostname()} differs from rank 0 in {', '.join(differences)}: "
            "start all ranks with the same command, data and versions"
        )


def _claim(output: Path, identity: Identity, stack: ExitStack) -> None:
    """Make and lock the folder in which the run is written until it is whole.

    Raises:
        UserError: it holds an unfinished run with other settings, data or versions; names them.
    """
    part = aside(output)
    if differences := differences_from(part, identity):
        raise UserError(
            f"'{part}' holds an unfinished run with other {', '.join(differences)}: give the same to go on, "
            "choose another --output, or add --restart true to give it up"
        )
    stack.enter_context(whole_folder(output, keep=WHOLE))
    with whole_file(part / IDENTITY) as file:
        write_json(file, asdict(identity))


def _check_names(config: Config) -> None:
    """Refuse loggers, data and models that are not there, before any is read."""
    check_loggers(config.log_to)
    check_sources([config.train_data])
    check_eval_data(config.eval_data)
    check_model(config.model, config.pretrained)


def _read_training(config: Config) -> Index:
    """Return the index of the training data, of which there must be a batch."""
    index = training_index(config)
    check_enough(index, config.batch_size)
    return index


def _read_evaluation(config: Config, index: Index) -> list[EvaluationSet]:
    """Return the evaluation sets; those of the user's own have the classes of --classes or the training data."""
    sets = read_sets(config.eval_data, config, config.classes, index, config.prompt_template)
    names = [each.name for each in sets]
    if config.keep_best and config.keep_best not in names:
        raise UserError(
            f"--keep_best {config.keep_best} names no evaluation set: the sets are {', '.join(names)}"
        )
    return sets


def _check_prompts(config: Config, index: Index, sets: list[EvaluationSet]) -> Prompts:
    """Refuse classes and prompts that say nothing to any model; return those that a classifier begins with."""
    check_classes(config, index)
    prompts = prompts_of_training(config, index, sets)
    check_prompts(sets, config.model, config.pretrained)
    return prompts


def _notices(config: Config, sets: list[EvaluationSet], series: Series | None) -> list[str]:
    """Print what the user should know before the training, and return it."""
    idle = [] if series else idle_options(config)
    return _say([*idle, *resting_averages(config), *cautions_of_sizes(sets)])


def _missing(config: Config, model: nn.Module) -> list[str]:
    """Print which terms the model does not allow, and return it."""
    return _say(missing_parts(config, model))


def _say(notices: list[str]) -> list[str]:
    """Print sentences as warnings, and return them."""
    for text in notices:
        warnings.warn(text, stacklevel=2)
    return notices


def _scorer(
    config: Config, sets: list[EvaluationSet], start: Weights, folder: Path, series: Series | None
) -> Scorer:
    """Return what scores this run's weights, with the best of an earlier attempt."""
    scorer = Scorer(config, sets, start, folder, series.baseline if series else None)
    scorer.remember(read_log(folder))
    return scorer


def prepare(config: Config, model: nn.Module) -> None:
    """Add adapters, freeze, lock BatchNorm and switch activation checkpointing on, as ``config`` says.

    It prints which share of the model trains, where that is not all of it.

    Raises:
        UserError: the model does not allow what the settings ask for; names the settings.
    """
    if share := _fit(config, model):
        tqdm.write(str(share))


def check_trainable(config: Config, clip: Clip) -> None:
    """Refuse a run whose settings do not fit the model, as its training would, but before any training.

    Args:
        config: settings of the run.
        clip: the start, which is changed and of no further use.

    Raises:
        UserError: the model does not allow what the settings ask for; names the settings.
    """
    config = with_form_of(config, clip)
    clip.model.train()
    _fit(config, clip.model)
    objective(config, clip.model)
    check_extras(config, clip.model)
    if config.micro_batches(ranks().size) > 1:
        refuse_batch_statistics(clip.model)


def _fit(config: Config, model: nn.Module) -> Share | None:
    """Change the model as ``config`` says; return which share of it trains, None for all of it."""
    share = None
    if config.logit_bias is not None and contrast_of(model) == "sigmoid":
        nn.init.constant_(model.get_parameter("logit_bias"), config.logit_bias)
    if config.adapted:
        share = adapt(config, model)
    freeze(model, config.freeze, config.freeze_image_blocks, config.freeze_text_blocks)
    if config.freezing:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        share = Share(trained, sum(p.numel() for p in model.parameters()))
    add_baseline(config, model)
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
    return share


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
        Diverged: weights are not finite, so that their accuracy would mean nothing.
    """
    exact = {}
    for name in ("student", "teacher", "last"):
        state = getattr(trained, name)
        if state is None:
            continue
        exact[name] = state | {n: v for n, v in frozen.items() if n in state}
        key = first_not_finite(exact[name])
        if key is not None:
            raise Diverged(
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
    if head := head_state(start):
        write_tensors(folder / START_HEAD, head)
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
    sets: list[EvaluationSet],
    start: Weights,
    folder: Path,
) -> dict[str, Any]:
    """Return what the files of results of a run begin with."""
    digests: dict[str, str | None] = {"zero-shot": digest_of_start(config.model, config.pretrained, start)}
    digests |= {name: digest_of(folder / f"{name}.safetensors") for name in weights}
    return head("run", model, digests, sets)


def note_start(config: Config, index: Index, sets: list[EvaluationSet], here: Ranks) -> None:
    """Print what is about to be trained, on what, and for how long."""
    classes = f"{counted(len(index.classes), 'class', 'classes')}, " if index.classes else ""
    captions = len(index.columns.captions)
    pairs = config.total_steps * config.batch_size * config.accumulation
    method = config.method + (f" with a {config.teacher} teacher" if config.method == "tracer" else "")
    ranks_ = f" on {here.size} ranks" if here.size > 1 else ""
    tqdm.write(
        f"{method}: {counted(len(index), 'picture')}, {classes}"
        f"{counted(captions, 'caption') if captions else 'no captions'}; {counted(config.total_steps, 'step')} of "
        f"{counted(config.batch_size * config.accumulation, 'pair')}, {counted(pairs / len(index), 'epoch')}; "
        f"{compute_device().type}{ranks_}, {resolve_precision(config.precision)}"
    )
    for text in sentences(sets):
        tqdm.write(f"evaluation of {text}")


def _print_sizes(sizes: dict[str, int]) -> None:
    """Print what the run keeps: the optimizer's state, a checkpoint, and each file of weights."""
    files = ("adapters", "adapters_last", "student", "teacher")
    kept = {"optimizer state": sizes["optimizer_bytes"], "checkpoint": sizes["checkpoint_bytes"]}
    kept |= {f"{n}.safetensors": sizes[f"{n}_bytes"] for n in files if f"{n}_bytes" in sizes}
    tqdm.write(", ".join(f"{name} {size / 1e6:.3g} MB" for name, size in kept.items()))
