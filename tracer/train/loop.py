"""The training loop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from tracer.adapters import adapter_schedule
from tracer.data.batches import TrainingBatches
from tracer.data.index import Index
from tracer.losses import TracerLoss
from tracer.machine import resolve_precision
from tracer.models.clip import Clip, encode, projections
from tracer.schedules import EMA, WMA, Frozen, Schedule, Uniform
from tracer.teacher import MovingAverageTeacher, build_teacher
from tracer.train.checkpoint import Checkpoints
from tracer.train.config import Config
from tracer.train.engine import full_weights, mixed_precision, optimizer_sizes, start_engine
from tracer.train.log import StepLog

if TYPE_CHECKING:
    import deepspeed


GAP_EVERY = 5  # optimizer steps between two exact measurements of the gap to the teacher


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
        momentum = adapter_schedule(config.total_steps, config.adapter_momentum)
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
