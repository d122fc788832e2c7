"""The training loop: student, teacher and loss of each step, in the order of the paper's algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tracer import recipes
from tracer.adapters import adapter_schedule
from tracer.data.batches import Batch, TrainingBatches, Variation
from tracer.data.index import Index
from tracer.data.skipped import Skipped
from tracer.errors import Stopped, UserError
from tracer.losses import TracerLoss
from tracer.machine import resolve_precision
from tracer.models.clip import Clip, encode, projections
from tracer.ops import contrastive_loss
from tracer.schedules import EMA, WMA, Frozen, Schedule, Uniform
from tracer.teacher import MovingAverageTeacher, build_teacher
from tracer.train.checkpoint import Checkpoints
from tracer.train.config import Config
from tracer.train.engine import full_weights, mixed_precision, optimizer_sizes, start_engine
from tracer.train.log import StepLog
from tracer.train.stop import stop_requests

if TYPE_CHECKING:
    from tracer.train.engine import DeepSpeedEngine

MEASURE_EVERY = 5  # optimizer steps between two measurements of the loss's diagnostics and of the teacher gap

Weights = dict[str, Tensor]  # a state dict in float32


class Averages(NamedTuple):
    """The moving averages of a run; None where the method has none.

    ``teacher`` averages all that trains, and teaches the student. ``student`` averages the adapters (R-Adapter's
    W̃), and is folded in place of the last step's.
    """

    teacher: MovingAverageTeacher | None
    student: MovingAverageTeacher | None

    def by_name(self) -> dict[str, MovingAverageTeacher]:
        """Return the averages that there are, by their names."""
        return {name: average for name, average in self._asdict().items() if average is not None}


class Trained(NamedTuple):
    """What a training run leaves: float32 weights, and sizes in parameters and bytes."""

    student: Weights  # those to keep: the adapters' average where there is one, else the last step's
    teacher: Weights | None
    last: Weights  # of the student after the last step
    sizes: dict[str, int]


class Trainer:
    """A model with all that a training step takes: engine, moving averages and loss.

    Args:
        config: settings with steps, not epochs.
        model: open_clip model, with adapters if ``config`` trains adapters. The engine changes it.
    """

    def __init__(self, config: Config, model: nn.Module) -> None:
        self.config = config
        self.engine = start_engine(config, model)
        self.averages = moving_averages(config, self.engine)
        self.loss = objective(config)
        self.precision = resolve_precision(config.precision)
        self.dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.pictures: list[int] = []  # of the last step, by their numbers in the data set
        self.engine.train()

    def step(self, step: int, micro_batches: Iterable[Batch], measure: bool) -> dict[str, Tensor | float]:
        """Take optimizer step ``step`` (1, 2, …) and return the scalars to log.

        The gradient is the mean over the micro-batches, and so are the loss and its terms. ``skipped`` is 1 where
        the loss or the gradient was not finite: weights, averages and the learning rate's schedule then stay where
        they were. With ``measure`` the loss's diagnostics, again means over the micro-batches, and the gap to the
        teacher on the last micro-batch are added.
        """
        config, engine, teacher = self.config, self.engine, self.averages.teacher
        started, lr = time.perf_counter(), engine.get_lr()[0]
        measured: list[dict[str, Tensor]] = []  # of each micro-batch
        self.pictures = []
        for batch in micro_batches:
            self.pictures += batch.index.tolist()
            image = batch.image.to(self.dtype)
            with mixed_precision(engine.device, self.precision):
                student_output = encode(engine, image, batch.text)
                teacher_output = encode(teacher.encode, image, batch.text) if teacher else None
                loss, terms, diagnostics = self.loss(
                    *student_output,
                    labels=batch.label if config.positives else None,
                    teacher=teacher_output,
                    projections=projections(engine.module) if teacher and not config.adapted else None,
                    stats=measure,
                )
            # A NaN in all gradients: the optimizer's own check then sees a loss that is not finite too.
            engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))
            measured.append({"loss": loss.detach(), **terms} | diagnostics)
            engine.step()  # moves the weights after the last micro-batch; until then it adds up gradients
        for average in self.averages.by_name().values():
            average.update(step)
        scalars = means(measured)
        if measure and teacher and config.zero_stage < 3:
            scalars["kl"] = teacher_gap(engine, teacher, image, batch.text)
        scalars |= {
            "logit_scale": student_output[2],
            "lr": lr,
            "skipped": float(not engine.was_step_applied()),
        }
        return scalars | {"step_seconds": time.perf_counter() - started}


def means(measured: list[dict[str, Tensor]]) -> dict[str, Tensor | float]:
    """Return the mean of each scalar over the micro-batches of a step."""
    if len(measured) == 1:
        return dict(measured[0])
    return {
        name: torch.stack([torch.as_tensor(m[name]).detach().float() for m in measured]).mean()
        for name in measured[0]
    }


def train(config: Config, clip: Clip, index: Index, log: StepLog, checkpoints: Checkpoints) -> Trained:
    """Train ``clip.model`` on the pictures of ``index``, from the last checkpoint on."""
    torch.manual_seed(config.seed)
    trainer = Trainer(config, clip.model)
    engine, averages = trainer.engine, trainer.averages
    checkpoints.resume(engine, averages.by_name())
    done, total = checkpoints.step, config.total_steps
    skipped = Skipped(len(index), config.max_bad, checkpoints.skipped)
    batches = iter(
        TrainingBatches(
            index,
            clip,
            batch_size=config.batch_size,
            steps=total * config.accumulation,
            first=done * config.accumulation,
            seed=config.seed,
            crop_scale=config.crop_scale,
            workers=config.workers,
            device=engine.device,
            loading=config,
            variation=Variation(config.crop_scale, config.flip, config.color_jitter, config.shuffle_window),
            skipped=skipped,
        )
    )
    steps = range(done + 1, total + 1)
    bar = tqdm(steps, desc=config.output.name, unit="step", initial=done, total=total)
    with stop_requests() as request:
        for step in bar:
            measure = step % MEASURE_EVERY == 0 or step == total
            log.write(step, trainer.step(step, islice(batches, config.accumulation), measure))
            if log.skipped:
                bar.set_postfix(skipped=log.skipped)
            if log.skipped_in_a_row >= config.max_skipped:
                pictures = [index.id(n) for n in trainer.pictures]
                raise _not_finite(config, step, log.skipped_in_a_row, pictures)
            if step % config.save_every == 0 or step == total or request.signal:
                log.sync()  # before the checkpoint, which relies on the log's rows
                checkpoints.save(step, engine, averages.by_name(), skipped.rows(step * config.accumulation))
            if request.signal:
                raise Stopped(
                    f"stopped after step {step} of {total}, which is saved; the same command goes on from there",
                    request.signal,
                )
    if log.skipped == total:
        raise _not_finite(config, total, total, [index.id(n) for n in trainer.pictures])
    last = full_weights(engine)
    trained = Trained(
        student=averages.student.gather() if averages.student else last,
        teacher=averages.teacher.gather() if averages.teacher else None,
        last=last,
        sizes=optimizer_sizes(engine) | {"checkpoint_bytes": checkpoints.nbytes()},
    )
    engine.destroy()  # its hooks would keep model and optimizer in memory, in a comparison for every run
    return trained


def _not_finite(config: Config, step: int, skipped: int, pictures: list[str]) -> UserError:
    """Return the error for ``skipped`` steps in a row, the last of them on ``pictures``."""
    batches = f"batch {step}" if config.accumulation == 1 else f"micro-batches of batch {step}"
    named = ", ".join(f"'{picture}'" for picture in pictures[:3]) or "no pictures"
    return UserError(
        f"the loss or its gradient was not finite in {skipped} steps in a row; the last is step {step}, {batches} "
        f"with {named}{f' and {len(pictures) - 3} more' * (len(pictures) > 3)}: lower --lr, give a --clip_grad "
        "above 0, or check the start's weights (--max_skipped sets the bound)"
    )


def moving_averages(config: Config, engine: DeepSpeedEngine) -> Averages:
    """Return the moving averages that ``config`` asks for, each starting at the engine's present weights."""
    teacher = student = None
    if config.method == "tracer":
        teacher = build_teacher(engine, teacher_schedule(config))
    if config.adapted and config.adapter_momentum:
        student = build_teacher(engine, adapter_schedule(config.total_steps, config.adapter_momentum))
    return Averages(teacher, student)


def teacher_schedule(config: Config) -> Schedule:
    """Return the teacher's schedule that ``config`` names."""
    if config.teacher == "ema":
        every = config.teacher_every or recipes.EMA.every
        return EMA(config.total_steps, config.ema_start, config.ema_end, config.ema_warmup, every)
    every = config.teacher_every or recipes.WMA.every
    if config.teacher == "wma":
        return WMA(config.total_steps, config.wma_beta, every)
    return Uniform(every) if config.teacher == "uniform" else Frozen()


def objective(config: Config) -> TracerLoss:
    """Return the loss that ``config`` describes; called without a teacher, it is the contrastive term alone."""
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


@torch.no_grad()
def teacher_gap(
    engine: DeepSpeedEngine, teacher: MovingAverageTeacher, image: Tensor, text: Tensor
) -> Tensor:
    """Return KL(teacher ‖ student) on a batch in nats, mean of both directions, without mixed precision.

    The relational term of a mixed-precision step cannot show a gap below the rounding of its logits.
    """
    engine.eval()
    student_output = encode(engine.module, image, text)
    teacher_image, teacher_text, teacher_logit_scale = encode(teacher.encode, image, text)
    engine.train()
    return contrastive_loss(
        *student_output,
        teacher_image=teacher_image,
        teacher_text=teacher_text,
        teacher_logit_scale=teacher_logit_scale,
        relational=1.0,
    ).terms["relational"]
