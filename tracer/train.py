"""The fine-tuning loop: an open_clip model, a DeepSpeed engine, a moving teacher, the fused loss.

    run = finetune(Config(train_data=Path("train.csv"), eval_data={"test": Path("test.csv")}))

A run is a folder that appears only when it is whole: ``config.yaml``, ``log.jsonl`` (a line per step),
``tensorboard/``, ``student.safetensors`` and ``teacher.safetensors`` (plain open_clip checkpoints),
``metrics.json`` (zero-shot accuracy and calibration per evaluation set) and ``run.json`` (versions, time, sizes).
Until then it is ``<output>.part``, and the same call goes on from the checkpoint in it (tracer/checkpoint.py).
Where adapters trained, also ``adapters.safetensors``, which the student is folded from, and
``adapters_last.safetensors``, the same without the moving average: with them any α costs no training.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found no GPU

import deepspeed
import torch.distributed as dist
import yaml
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from tqdm import tqdm

from tracer import icons
from tracer.adapters import TOWERS, Share, accumulation, adapter_state, add_adapters, fold, save_adapters
from tracer.checkpoint import WHOLE, Checkpoints
from tracer.config import Config
from tracer.data import Index, TrainingBatches, check_pictures, read_index
from tracer.errors import UserError
from tracer.evaluate import check_labels, class_prompts, evaluate_zero_shot
from tracer.files import sync, whole_folder
from tracer.log import StepLog, versions
from tracer.losses import TracerLoss
from tracer.model import DEMO, Clip, compute_device, encode, load_clip, projections, save_weights
from tracer.teacher import EMA, WMA, Frozen, MovingAverageTeacher, Schedule, Uniform, build_teacher

GAP_EVERY = 5  # optimizer steps between two exact measurements of the gap to the teacher

# The only op that DeepSpeed would compile at start-up (a minute, needs g++); only inference uses it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


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
        metrics = {}
        for name, state in trained.items():
            save_weights(state, folder / f"{name}.safetensors")
            if tests:
                clip.model.load_state_dict(state)
                metrics[name] = evaluate_zero_shot(clip, tests, prompts, workers=config.workers)
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
    except UserError as error:
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
    start = icons.CHECKPOINT if config.model == DEMO and not config.pretrained else config.pretrained
    files = [Path(name) for name in (config.model, config.classes, start) if name]
    content = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()]
    data = [index.digest(), *(read_index(path).digest() for path in config.eval_data.values())]
    return hashlib.sha256(json.dumps([settings, content, data, versions()]).encode()).hexdigest()


def is_run_of(config: Config, folder: Path) -> bool:
    """Whether ``folder`` holds a whole run with the settings, data, start and version of ``config``."""
    about = folder / "run.json"
    whole = all((folder / name).is_file() for name in ("run.json", "metrics.json", "student.safetensors"))
    return whole and json.loads(about.read_text()).get("fingerprint") == fingerprint(config)


def _train(
    config: Config, clip: Clip, index: Index, log: StepLog, checkpoints: Checkpoints
) -> tuple[dict[str, dict[str, Tensor]], dict[str, int]]:
    """Train ``clip.model`` from the last checkpoint on; returns float32 weights by role, and sizes.

    Roles: student; teacher, if there was one; with adapters also last, the student without their average.
    """
    torch.manual_seed(config.seed)
    engine = start_engine(config, clip.model)
    device, precision = engine.device, resolve_precision(config.precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    averages = {}
    if config.method == "tracer":
        averages["teacher"] = build_teacher(engine, schedule(config))
    if config.adapted and config.adapter_momentum:
        momentum = accumulation(config.total_steps, config.adapter_momentum)
        averages["student"] = build_teacher(engine, momentum)
    teacher = averages.get("teacher")
    checkpoints.resume(engine, averages)
    done = checkpoints.step * config.accumulation
    loss_fn = objective(config)
    batches = TrainingBatches(
        index,
        clip,
        batch_size=config.batch_size,
        steps=config.total_steps * config.accumulation,
        first=done,
        seed=config.seed,
        crop_scale=config.crop_scale,
        workers=config.workers,
        device=device,
    )
    engine.train()
    progress = tqdm(batches, desc=config.output.name, unit="step", initial=done, total=done + len(batches))
    for micro_step, batch in enumerate(progress, done + 1):
        started = time.perf_counter()
        image = batch.image.to(dtype)
        with mixed_precision(device, precision):
            student = encode(engine, image, batch.text)
            guide = encode(teacher.encode, image, batch.text) if teacher else None
            output = loss_fn(
                *student,
                labels=batch.label if config.positives else None,
                teacher=guide,
                projections=projections(engine.module) if teacher and not config.adapted else None,  # frozen
            )
        lr = engine.get_lr()[0]
        engine.backward(output.loss)
        engine.step()
        if micro_step % config.accumulation:
            continue
        step = micro_step // config.accumulation
        for average in averages.values():
            average.update(step)
        gap = {}
        if teacher and config.zero_stage < 3 and (step % GAP_EVERY == 0 or step == config.steps):
            gap["kl"] = teacher_gap(engine, teacher, image, batch.text)
        log.write(
            step,
            loss=output.loss,
            **output.terms,
            **gap,
            logit_scale=student[2],
            lr=lr,
            step_seconds=time.perf_counter() - started,
        )
        if step % config.save_every == 0 or step == config.steps:
            log.sync()  # the log first: a checkpoint relies on its rows
            checkpoints.save(step, engine, averages)
    last = full_weights(engine)
    weights = {"student": last} | {name: average.gather() for name, average in averages.items()}
    if config.adapted:
        weights["last"] = last
    sizes = optimizer_sizes(engine) | {"checkpoint_bytes": checkpoints.nbytes()}
    engine.destroy()  # its hooks would keep model and optimizer in memory, in a comparison for every run
    return weights, sizes


@torch.no_grad()
def teacher_gap(
    engine: deepspeed.DeepSpeedEngine, teacher: MovingAverageTeacher, image: Tensor, text: Tensor
) -> Tensor:
    """KL(teacher ‖ student) on a batch in nats, mean of both directions, without mixed precision.

    The relational term of a mixed-precision step cannot show a gap below its rounding: about 5e-4 for the
    demo's model in bf16, where the same batch in float32 goes down to 1e-9.
    """
    engine.eval()
    student, guide = encode(engine.module, image, text), encode(teacher.encode, image, text)
    engine.train()
    return TracerLoss(relational=1.0, feature=0.0, interactive=0.0, cross=0.0)(*student, guide).terms[
        "relational"
    ]


def start_engine(config: Config, model: nn.Module) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine with AdamW, linear warm-up and cosine decay, on the present process group.

    Without a launcher the process becomes a group of one. Gains, biases and the logit scale are not decayed.
    """
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("several ranks are not supported yet: start one process")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    precision = resolve_precision(config.precision)
    optimizer = torch.optim.AdamW(groups, lr=config.recipe.lr, betas=(0.9, 0.98), eps=1e-6)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda adam: lr_schedule(config, adam),
        config={
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": config.accumulation,
            "gradient_clipping": config.clip_grad,
            "zero_optimization": {"stage": config.zero_stage},
            "bf16": {"enabled": precision == "bf16"},
            "torch_autocast": {
                "enabled": precision == "amp_bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # gradients stay fp32
            },
            "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own would be compiled first
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
    )
    return engine


def optimizer_sizes(engine: deepspeed.DeepSpeedEngine) -> dict[str, int]:
    """How many parameters this rank's optimizer trains, and the bytes of its state (Adam's moments)."""
    trained = sum(
        math.prod(getattr(p, "ds_shape", p.shape)) for p in engine.module.parameters() if p.requires_grad
    )
    state = engine.basic_optimizer.state.values()
    kept = [value for values in state for value in values.values() if isinstance(value, Tensor)]
    return {"trained_parameters": trained, "optimizer_bytes": sum(value.nbytes for value in kept)}


def resolve_precision(precision: str) -> str:
    """What ``auto`` means on this machine; anything else as it is."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "amp_bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return (
        "amp_bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
    )


@contextmanager
def mixed_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Products in bf16 for ``amp_bf16``; on the CPU also attention as plain products.

    The CPU's fused attention is slow in bf16: with it a step of the demo's model takes 0.17 s instead of 0.11 s
    (2 cores of an AVX-512 machine, batch 128).
    """
    with ExitStack() as stack:
        if precision == "amp_bf16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def lr_schedule(config: Config, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Linear warm-up over ``config.warmup`` steps, then cosine to 0 at ``config.total_steps``."""
    cosine = CosineAnnealingLR(optimizer, max(1, config.total_steps - config.warmup))
    if not config.warmup:
        return cosine
    rise = LinearLR(optimizer, 1 / config.warmup, 1.0, total_iters=config.warmup)
    return SequentialLR(optimizer, [rise, cosine], [config.warmup])


def schedule(config: Config) -> Schedule:
    """The teacher's schedule that ``config`` names."""
    every = config.teacher_every or (500 if config.teacher == "ema" else 1)
    if config.teacher == "wma":
        return WMA(config.total_steps, config.wma_beta, every)
    if config.teacher == "ema":
        return EMA(config.total_steps, config.ema_start, config.ema_end, config.ema_warmup, every)
    return Uniform(every) if config.teacher == "uniform" else Frozen()


def objective(config: Config) -> TracerLoss:
    """The loss that ``config`` describes; without a teacher and projections it is the contrastive term alone."""
    return TracerLoss(
        distill_weight=config.distill_weight,
        relational=config.relational,
        feature=config.feature,
        interactive=config.interactive,
        cross=config.cross,
        projection_product=config.projection_product,
        projection_orthogonal=config.projection_orthogonal,
        margin=config.recipe.margin,
        smoothing=config.recipe.smoothing,
    )


def full_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """The student's state dict with the optimizer's float32 weights, whatever the ZeRO stage."""
    sharded = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=sharded):
        state = {name: value.detach().clone() for name, value in engine.module.state_dict().items()}
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            state[name] = master.detach().clone().view(state[name].shape)
    return {n: v.float() if v.is_floating_point() else v for n, v in state.items()}
