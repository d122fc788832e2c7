"""A fine-tuning run as a folder: its identity, its training, its results."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from tqdm import tqdm

from tracer.adapters import TOWERS, Share, adapter_state, add_adapters, fold, save_adapters
from tracer.data.check import check_pictures
from tracer.data.decoded import DecodedPictures
from tracer.data.index import read_index
from tracer.errors import UserError
from tracer.evaluation.prompts import check_labels, class_prompts
from tracer.evaluation.zero_shot import evaluate_zero_shot
from tracer.files import sync, whole_folder
from tracer.machine import compute_device, resolve_precision, versions
from tracer.models.clip import load_clip, weights_file
from tracer.models.weights import save_weights
from tracer.train.checkpoint import WHOLE, Checkpoints
from tracer.train.config import Config
from tracer.train.log import StepLog
from tracer.train.loop import _train


def finetune(config: Config) -> Path:
    """Fine-tune as ``config`` says, evaluate, and return the folder of the run.

    A run that was cut off goes on from its last checkpoint, and ends as if it had not been.

    Raises:
        UserError: anything in the settings or the data that the user can mend.
    """
    config.validate()
    if config.output.exists():
        raise UserError(f"'{config.output}' exists: choose another --output or remove it")
    started = time.perf_counter()
    index = read_index(config.train_data)  # first, for a mistake here is the likeliest
    tests = [read_index(path, name) for name, path in config.eval_data.items()]
    prompts = class_prompts(config.classes, index.classes) if tests else {}
    check_labels(tests, prompts)
    config = config.resolve(len(index))
    torch.manual_seed(config.seed)  # of weights without a start, and of adapters with a rank
    clip = load_clip(config.model, config.pretrained)
    start = clip.model.state_dict()  # stays float32, whatever the engine does to the model
    if config.adapted:
        tqdm.write(str(adapt(config, clip.model)))
    reached = 1 - config.adapter_momentum**config.total_steps
    if config.adapted and reached < 0.8:
        tqdm.write(
            f"the adapters' average will hold {reached:.0%} of them: with so few steps, "
            f"choose an --adapter_momentum below {config.adapter_momentum:g}"
        )
    identity = fingerprint(config)
    with whole_folder(config.output, keep=WHOLE) as folder:
        checkpoints = Checkpoints(folder, decisive(config), identity, started)
        if checkpoints.step:
            tqdm.write(f"'{folder}': going on after step {checkpoints.step} of {config.steps}")
        if config.check_images:
            for data in (index, *tests):
                check_pictures(data, config.cache, config.workers)
        (folder / "config.yaml").write_text(config.to_yaml())
        with StepLog(folder, after=checkpoints.step) as log:
            trained, sizes = _train(config, clip, index, log, checkpoints)

        clip = load_clip(config.model, config.pretrained)  # the trained one may be bf16, or in shards
        clip.model.to(compute_device())
        if config.adapted:
            for name, file in (("student", "adapters"), ("last", "adapters_last")):
                save_adapters(trained[name], folder / f"{file}.safetensors", clip.name)
            del trained["last"]
            trained = {n: fold(start | adapter_state(s), config.adapter_alpha) for n, s in trained.items()}
        metrics, decoded = {}, DecodedPictures()
        for name, state in trained.items():
            save_weights(state, folder / f"{name}.safetensors")
            if tests:
                clip.model.load_state_dict(state)
                metrics[name] = evaluate_zero_shot(
                    clip, tests, prompts, workers=config.workers, decoded=decoded
                )
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
        about = {
            "seconds": checkpoints.seconds,
            "precision": resolve_precision(config.precision),
            "sizes": sizes | {f"{p.stem}_bytes": p.stat().st_size for p in folder.glob("*.safetensors")},
            "versions": versions(),
            "fingerprint": identity,
        }
        if config.adapted:
            kept = {"optimizer state": sizes["optimizer_bytes"], "checkpoint": sizes["checkpoint_bytes"]}
            kept |= {p.name: p.stat().st_size for p in sorted(folder.glob("*.safetensors"))}
            tqdm.write(", ".join(f"{name} {size / 1e6:.3g} MB" for name, size in kept.items()))
        (folder / "run.json").write_text(json.dumps(about, indent=1))
        sync(folder)
    for needless in config.output.glob("checkpoint-*"):
        shutil.rmtree(needless)
    return config.output


def adapt(config: Config, model: nn.Module) -> Share:
    """Add the adapters that ``config`` describes; UserError where the model or the settings do not allow it."""
    towers = TOWERS if config.adapter_towers == "both" else (config.adapter_towers,)
    try:
        return add_adapters(model, rank=config.adapter_rank, drop=config.adapter_drop, towers=towers)
    except ValueError as error:
        raise UserError(f"{error} (--adapter_towers, --adapter_rank, --method)") from error


def decisive(config: Config) -> dict[str, Any]:
    """The settings that decide a run's result."""
    settings = yaml.safe_load(config.to_yaml()) | {"precision": resolve_precision(config.precision)}
    free = ("output", "save_every", "cache", "workers", "check_images")
    return {name: value for name, value in settings.items() if name not in free}


def fingerprint(config: Config) -> str:
    """A digest of all that decides a run's result: settings, version, and the files that it reads."""
    index = read_index(config.train_data)
    settings = decisive(config.resolve(len(index)))
    start = weights_file(config.model, config.pretrained)
    files = [Path(name) for name in (config.model, config.classes, start) if name]
    content = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()]
    data = [index.digest(), *(read_index(path).digest() for path in config.eval_data.values())]
    return hashlib.sha256(json.dumps([settings, content, data, versions()]).encode()).hexdigest()


def is_run_of(config: Config, folder: Path) -> bool:
    """Whether ``folder`` holds a whole run with the settings, data, start and version of ``config``."""
    about = folder / "run.json"
    whole = all((folder / name).is_file() for name in ("run.json", "metrics.json", "student.safetensors"))
    return whole and json.loads(about.read_text()).get("fingerprint") == fingerprint(config)
