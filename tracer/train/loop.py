"""The training loop: student, teacher and loss of each step, in the order of the paper's algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from tracer.adapters import Adapter, adapter_schedule, set_drops
from tracer.data.batches import Batch, TrainingBatches, Variation
from tracer.data.index import Index
from tracer.data.order import adapter_draws
from tracer.data.skipped import Skipped
from tracer.errors import Stopped, UserError
from tracer.losses import TracerLoss
from tracer.machine import resolve_precision
from tracer.models.clip import Clip, texts_stand_alone
from tracer.models.towers import compile_towers
from tracer.ops import contrastive_loss
from tracer.schedules import EMA, WMA, Frozen, Schedule, Uniform
from tracer.teacher import MovingAverageTeacher, build_teacher
from tracer.train.cached import (
    Cached,
    MicroBatch,
    OneShot,
    encode_all,
    micro_batches,
    refuse_batch_statistics,
)
from tracer.train.checkpoint import Checkpoints
from tracer.train.config import Config
from tracer.train.engine import (
    LogitScaleBound,
    full_weights,
    mixed_precision,
    optimizer_sizes,
    start_engine,
)
from tracer.train.log import StepLog
from tracer.train.ranks import ranks
from tracer.train.scoring import Scorer, Weights
from tracer.train.stop import stop_requests

if TYPE_CHECKING:
    from tracer.train.engine import DeepSpeedEngine

MEASURE_EVERY = 5  # optimizer steps between two measurements of the loss's diagnostics and of the teacher gap


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
        self.bound_logit_scale = LogitScaleBound(self.engine)
        self.precision = resolve_precision(config.precision)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)
        if config.compile:  # after the averages have copied the module
            compile_towers(self.engine.module)
            if self.averages.teacher:
                compile_towers(self.averages.teacher.module)
        self.pictures: list[int] = []  # of the last step, by their numbers in the data set
        self.engine.train()
        model = self.engine.module
        self.adapters = sum(isinstance(module, Adapter) for module in model.modules())
        self.distinct = config.micro_batch is not None and texts_stand_alone(model)
        self.micro_batches = config.micro_batches(ranks().size)
        if self.micro_batches > 1:
            refuse_batch_statistics(model)

    def step(self, step: int, batches: Iterable[Batch], measure: bool) -> dict[str, Tensor | float]:
        """Take optimizer step ``step`` (1, 2, …) and return the scalars to log.

        The gradient is the mean over the batches, and so are the loss and its terms. ``skipped`` is 1 where the
        loss or the gradient was not finite: weights, averages and the learning rate's schedule then stay where
        they were. In fp16 ``loss_scale`` is logged, and ``overflow`` is 1 where the step was skipped for too large
        a scale. Random numbers depend on (seed, step) alone. With ``measure`` the loss's diagnostics, again means
        over the batches, and the gap to the teacher on the last batch are added.
        """
        config, engine, teacher = self.config, self.engine, self.averages.teacher
        started, lr = time.perf_counter(), engine.get_lr()[0]
        torch.manual_seed(step_seed(config.seed, step))  # dropout: the same on every rank
        measured: list[dict[str, Tensor | float]] = []  # of each batch
        self.pictures = []
        for number, batch in enumerate(batches, (step - 1) * config.accumulation):
            self.pictures += batch.index.tolist()
            set_drops(engine.module, adapter_draws(self.adapters, config.seed, number))
            parts = micro_batches(batch, self.micro_batches, self.dtype, self.distinct)
            measured.append(self._add_gradient(parts, batch.label, measure))
        self.bound_logit_scale()
        for average in self.averages.by_name().values():
            average.update(step)
        scalars = means(measured)
        if measure and teacher:
            scalars["kl"] = teacher_gap(engine, teacher, parts)
        scalars |= {"lr": lr} | self.skipped(scalars["loss"])
        return scalars | {"step_seconds": time.perf_counter() - started}

    def skipped(self, loss: Tensor | float) -> dict[str, Tensor | float]:
        """Return the scalars that say whether the last step was skipped, and in fp16 why."""
        skipped = not self.engine.was_step_applied()
        scalars: dict[str, Tensor | float] = {"skipped": float(skipped)}
        if self.precision == "fp16":
            scaler = self.engine.optimizer.loss_scaler
            scale = float(scaler.loss_scale)  # of the next step
            # At the least scale it was not the scale: the gradient itself is not finite.
            large = skipped and math.isfinite(loss) and scale > getattr(scaler, "min_scale", math.inf)
            scalars |= {"loss_scale": scale, "overflow": float(large)}
        return scalars

    def _add_gradient(
        self, parts: Sequence[MicroBatch], label: Tensor, measure: bool
    ) -> dict[str, Tensor | float]:
        """Add a batch to the step's gradient, and return its loss, terms, diagnostics and logit scale.

        The last batch of the step ends it: the weights move.
        """
        config, teacher = self.config, self.averages.teacher
        penalised = config.penalised
        if len(parts) == 1:
            student: OneShot | Cached = OneShot(self.engine, parts[0], self.precision, penalised)
        else:
            student = Cached(self.engine, parts, self.precision, penalised)
        with mixed_precision(self.engine.device, self.precision):
            teacher_output = encode_all(teacher.encode, parts) if teacher else None
            loss, terms, diagnostics = self.loss(
                *student.features,
                labels=label if config.positives else None,
                teacher=teacher_output,
                projections=student.matrices,
                stats=measure,
            )
        # A NaN in all gradients: the optimizer's own check then sees a loss that is not finite too.
        finite = torch.where(loss.detach().isfinite(), 1.0, math.nan)
        student.backward(loss * finite / config.accumulation)
        scale = student.features.logit_scale.detach()
        return {"loss": loss.detach(), **terms} | diagnostics | {"logit_scale": scale}


def step_seed(seed: int, step: int) -> int:
    """Return the seed of the random numbers that a training step draws, on every rank."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def means(measured: Sequence[Mapping[str, Tensor | float]]) -> dict[str, Tensor | float]:
    """Return the mean of each scalar over the batches of a step."""
    if len(measured) == 1:
        return dict(measured[0])
    return {
        name: torch.stack([torch.as_tensor(m[name]).detach().float() for m in measured]).mean()
        for name in measured[0]
    }


def train(
    config: Config,
    clip: Clip,
    index: Index,
    log: StepLog,
    checkpoints: Checkpoints,
    scorer: Scorer | None = None,
    title: str = "",
) -> Trained:
    """Train ``clip.model`` on the pictures of ``index``, from the last checkpoint on.

    Args:
        config, clip, index: what is trained how on what.
        log: of the steps.
        checkpoints: of the run.
        scorer: of the first rank, for evaluations during the training.
        title: of the bar.
    """
    torch.manual_seed(config.seed)
    trainer = Trainer(config, clip.model)
    engine, averages = trainer.engine, trainer.averages
    checkpoints.resume(engine, averages.by_name())
    done, total = checkpoints.step, config.total_steps
    here = ranks()
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
            rank=here.rank,
            world_size=here.size,
            loading=config,
            variation=Variation(config.crop_scale, config.flip, config.color_jitter, config.shuffle_window),
            skipped=skipped,
        )
    )
    steps = range(done + 1, total + 1)
    bar = tqdm(steps, desc=title, unit="step", initial=done, total=total, disable=not here.first)
    shown = Shown(bar, config.batch_size * config.accumulation)
    with stop_requests(quiet=not here.first) as request:
        for step in bar:
            measure = step % MEASURE_EVERY == 0 or step == total
            scalars = trainer.step(step, islice(batches, config.accumulation), measure)
            if config.eval_every and (step % config.eval_every == 0 or step == total):
                scalars |= evaluate_now(step, engine, averages, scorer)
            log.write(step, scalars)
            shown.update(scalars["loss"], log.skipped)
            if log.skipped_in_a_row >= config.max_skipped:
                pictures = [index.id(n) for n in trainer.pictures]
                raise _not_finite(config, step, log.skipped_in_a_row, pictures)
            stop = here.stop_step(step, request.signal)
            if step % config.save_every == 0 or step == total or stop:
                log.sync()  # before the checkpoint, which relies on the log's rows
                rows = here.together(skipped.rows(step * config.accumulation))
                checkpoints.save(step, engine, averages.by_name(), rows)
            if stop:
                raise Stopped(
                    f"stopped after step {step} of {total}, which is saved; the same command goes on from there",
                    stop,
                )
    if log.skipped == total:
        raise _not_finite(config, total, total, [index.id(n) for n in trainer.pictures])
    last, student, teacher = gathered(engine, averages)
    trained = Trained(
        student=student,
        teacher=teacher,
        last=last,
        sizes=optimizer_sizes(engine) | {"checkpoint_bytes": checkpoints.nbytes()},
    )
    engine.destroy()  # its hooks would keep model and optimizer in memory, in a comparison for every run
    return trained


def gathered(engine: DeepSpeedEngine, averages: Averages) -> tuple[Weights, Weights, Weights | None]:
    """Return the last step's weights, the student's to keep, and the teacher's; call it on every rank."""
    last = full_weights(engine)
    student = averages.student.gather() if averages.student else last
    return last, student, averages.teacher.gather() if averages.teacher else None


def evaluate_now(
    step: int, engine: DeepSpeedEngine, averages: Averages, scorer: Scorer | None
) -> dict[str, float]:
    """Return the scores of the present weights as scalars to log, on the first rank; call it on every rank."""
    _, student, teacher = gathered(engine, averages)
    return scorer.during(step, student, teacher) if scorer else {}


class Shown:
    """Shows loss and pairs per second in a bar, at most once a second: reading the loss waits for the GPU.

    Args:
        bar: of the steps.
        pairs: of a step.
    """

    def __init__(self, bar: tqdm, pairs: int) -> None:
        self._bar, self._pairs = bar, pairs
        self._time, self._steps = time.perf_counter(), 0

    def update(self, loss: Tensor | float, skipped: int) -> None:
        """Note a step, and show it if the last one is a second old."""
        self._steps += 1
        passed = time.perf_counter() - self._time
        if passed < 1 or self._bar.disable:
            return
        about = {"loss": f"{float(loss):.3f}", "pairs/s": f"{self._steps * self._pairs / passed:.0f}"}
        self._bar.set_postfix(about | ({"skipped": skipped} if skipped else {}))
        self._time, self._steps = time.perf_counter(), 0


def _not_finite(config: Config, step: int, skipped: int, pictures: list[str]) -> UserError:
    """Return the error for ``skipped`` steps in a row, the last of them on ``pictures``."""
    batches = f"batch {step}" if config.accumulation == 1 else f"the {config.accumulation} batches"
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
    every = config.moves_every
    if config.teacher == "ema":
        return EMA(config.total_steps, config.ema_start, config.ema_end, config.ema_warmup, every)
    if config.teacher == "wma":
        return WMA(config.total_steps, config.wma_beta, every)
    return Uniform(every) if config.teacher == "uniform" else Frozen()


def objective(config: Config) -> TracerLoss:
    """Return the loss that ``config`` describes; called without a teacher, it is the contrastive term alone."""
    return TracerLoss(
        **across_ranks(),
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


def across_ranks() -> dict[str, Any]:
    """Return the argument by which the loss compares the pairs of all ranks."""
    return {"group": dist.group.WORLD} if ranks().size > 1 else {}


@torch.no_grad()
def teacher_gap(
    engine: DeepSpeedEngine, teacher: MovingAverageTeacher, parts: Sequence[MicroBatch]
) -> Tensor:
    """Return KL(teacher ‖ student) on a batch in nats, mean of both directions, without mixed precision.

    The relational term of a mixed-precision step cannot show a gap below the rounding of its logits.
    """
    engine.eval()
    student_output = encode_all(engine.module, parts)
    teacher_image, teacher_text, teacher_logit_scale = encode_all(teacher.encode, parts)
    engine.train()
    return contrastive_loss(
        *student_output,
        teacher_image=teacher_image,
        teacher_text=teacher_text,
        teacher_logit_scale=teacher_logit_scale,
        relational=1.0,
        **across_ranks(),
    ).terms["relational"]
