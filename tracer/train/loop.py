"""The training loop: student, teacher and loss of each step, in the order of the paper's algorithm.

The file has over 500 lines: a step and what it makes of the settings are read together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from tracer import recipes
from tracer.adapters import Adapter, adapter_schedule, set_drops
from tracer.data.batches import Batch, TrainingBatches, Variation
from tracer.data.index import Index
from tracer.data.order import adapter_draws
from tracer.data.skipped import Skipped
from tracer.errors import Diverged, Stopped, UserError
from tracer.losses import TracerLoss
from tracer.machine import resolve_precision
from tracer.models.clip import BiasedFeatures, Clip, Features, contrast_of, projections, texts_stand_alone
from tracer.models.freezing import trained_batchnorm
from tracer.models.heads import without_fusion
from tracer.models.prefix import SharedPrefix
from tracer.models.towers import compile_towers, encode_text_first
from tracer.ops import Ahead, contrastive_loss
from tracer.schedules import EMA, WMA, Frozen, Schedule, Uniform
from tracer.teacher import MovingAverageTeacher, build_teacher
from tracer.train.cached import (
    Cached,
    MicroBatch,
    OneShot,
    encode_all,
    micro_batches,
    nowhere,
    refuse_batch_statistics,
)
from tracer.train.checkpoint import Checkpoints
from tracer.train.classifier import class_loss
from tracer.train.config import Config
from tracer.train.engine import (
    LogitScaleBound,
    full_weights,
    mixed_precision,
    optimizer_sizes,
    or_nan,
    start_engine,
    step_seed,
)
from tracer.train.extras import Extras
from tracer.train.log import Shown, StepLog
from tracer.train.ranks import ranks
from tracer.train.scoring import Scorer, Weights
from tracer.train.stop import StopHere, stop_requests
from tracer.words import counted

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
        self.text_first = encode_text_first(model)
        self.engine = start_engine(config, model)
        self.averages = moving_averages(config, self.engine)
        self.loss = objective(config, model)
        self._compares_teacher = self.loss.compares_teacher
        self.extras = Extras(config, self.engine.module)
        self.classifies = config.classifier != "none"
        self.bound_logit_scale = LogitScaleBound(self.engine)
        self.precision = resolve_precision(config.precision)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)
        if config.compile:  # after the averages have copied the module
            compile_towers(self.engine.module)
            if self.averages.teacher:
                compile_towers(self.averages.teacher.module)
        self.pictures: list[int] = []  # of the last step, by their numbers in the data set
        self._features: list[tuple[Tensor, Tensor]] = []  # of each of its batches
        self.engine.train()
        model = self.engine.module
        self.adapters = sum(isinstance(module, Adapter) for module in model.modules())
        self.distinct = config.micro_batch is not None and texts_stand_alone(model)
        self.micro_batches = config.micro_batches(ranks().size)
        if self.micro_batches > 1:
            refuse_batch_statistics(model)
        again = (
            config.compile or config.grad_checkpointing or self.micro_batches > 1
        )  # computed more than once
        teacher = self.averages.teacher if config.zero_stage < 3 and not again else None
        self._prefix = SharedPrefix(model, teacher.module if teacher else None)
        # The forward pass moves trained BatchNorm's statistics: half a step would stay in a checkpoint.
        self._may_stop_within = trained_batchnorm(model) is None
        self._point, self._own_seconds = nowhere, 0.0

    def step(
        self, step: int, batches: Iterable[Batch], measure: bool, point: Callable[[], None] | None = None
    ) -> dict[str, Tensor | float]:
        """Take optimizer step ``step`` (1, 2, …) and return the scalars to log.

        ``point`` is called where the run may stop within the step: weights, averages and the optimizer are then
        still as they were before it.

        The gradient is the mean over the batches, and so are the loss and its terms. ``skipped`` is 1 where the
        loss or the gradient was not finite: weights, averages and the learning rate's schedule then stay where
        they were. In fp16 ``loss_scale`` is logged, and ``overflow`` is 1 where the step was skipped for too large
        a scale. Random numbers depend on (seed, step) alone. With ``measure`` the loss's diagnostics, again means
        over the batches, and the gap to the teacher on the last batch are added.
        """
        config, engine, teacher = self.config, self.engine, self.averages.teacher
        started, lr = time.perf_counter(), max(engine.get_lr())
        torch.manual_seed(step_seed(config.seed, step))  # dropout: the same on every rank
        measured: list[dict[str, Tensor | float]] = []  # of each batch
        self.pictures, self._features = [], []
        watch, self._point = ranks().watch, (self._may_stop_within and point) or nowhere
        self._own_seconds, idle = 0.0, time.perf_counter()
        watch.at(step, "loads its pictures")
        for number, batch in enumerate(batches, (step - 1) * config.accumulation):
            self._own_seconds += time.perf_counter() - idle
            watch.at(step, "computes")
            self._point()
            self.pictures += batch.index.tolist()
            set_drops(engine.module, adapter_draws(self.adapters, config.seed, number))
            parts = micro_batches(batch, self.micro_batches, self.dtype, self.distinct)
            add = self._add_class_gradient if self.classifies else self._add_gradient
            measured.append(add(parts, batch.label, measure, step))
            idle = time.perf_counter()
        watch.own_work(self._own_seconds)
        self.bound_logit_scale()
        for average in self.averages.by_name().values():
            average.update(step)
        scalars = means(measured)
        if measure and teacher:
            scalars["kl"] = teacher_gap(engine, teacher, parts, config)
        scalars |= {"lr": lr} | self.skipped(scalars["loss"])
        return scalars | {"step_seconds": time.perf_counter() - started}

    def not_finite(self) -> list[int]:
        """Return the pictures of the last step for which this rank's features, or their text's, are not finite."""
        finite = [(image + text).isfinite().all(-1) for image, text in self._features]
        return [n for n, good in zip(self.pictures, torch.cat(finite).tolist(), strict=True) if not good]

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
        self, parts: Sequence[MicroBatch], label: Tensor, measure: bool, _step: int
    ) -> dict[str, Tensor | float]:
        """Add a batch to the step's gradient, and return its loss, terms, diagnostics and logit scale.

        The last batch of the step ends it: the weights move.
        """
        config, n = self.config, len(label)
        with Ahead(across_ranks(config).get("group"), n, n, config.mesh_shape) as ahead:
            with self._prefix:
                teacher_output = self._teacher_output(parts, measure, ahead)
                student = self._student(parts, ahead)
            with mixed_precision(self.engine.device, self.precision):
                u, v, scale, bias = with_bias(student.features, config)
                labels = label if config.positives else None
                loss, terms, diagnostics = self.loss(
                    u,
                    v,
                    scale,
                    labels=labels,
                    teacher=teacher_output[:3] if teacher_output else None,
                    projections=student.matrices,
                    stats=measure,
                    logit_bias=bias,
                    teacher_logit_bias=with_bias(teacher_output, config)[3] if teacher_output else None,
                    ahead=ahead,
                )
                extras = self.extras.terms(student.features, teacher_output, labels)
                for name, (weight, value) in extras.items():
                    loss, terms = loss + weight * value, {**terms, name: value.detach()}
        logged = {"logit_scale": scale.detach()}
        if isinstance(bias, Tensor):
            logged["logit_bias"] = bias.detach().clone()  # the step moves the weight itself
        self._features.append((student.features.image.detach(), student.features.text.detach()))
        self._point()
        student.backward(or_nan(loss) / config.accumulation)
        return {"loss": loss.detach(), **terms} | diagnostics | logged

    def _add_class_gradient(
        self, parts: Sequence[MicroBatch], label: Tensor, _measure: bool, step: int
    ) -> dict[str, Tensor | float]:
        """Add the cross-entropy of a batch's classes to the step's gradient, and return its mean over all ranks.

        Each picture has a loss of its own, so that a micro-batch needs nothing of the others.
        """
        config, engine, size = self.config, self.engine, ranks().size
        total = torch.zeros((), device=engine.device)
        for part, own in zip(parts, label.tensor_split(len(parts)), strict=True):
            loss, features = class_loss(config, engine, self.precision, part.image, own, step)
            self._features.append((features, features))
            total += loss.detach()
            self._point()
            share = size / (config.batch_size * config.accumulation)  # the engine averages over the ranks
            engine.backward(or_nan(loss) * share, scale_wrt_gas=False)
            engine.step()
        if size > 1:
            dist.all_reduce(total)
        return {"loss": total / config.batch_size}

    def _teacher_output(
        self, parts: Sequence[MicroBatch], measure: bool, ahead: Ahead
    ) -> Features | BiasedFeatures | None:
        """Return what the teacher says about a batch; other ranks get it while the student computes."""
        if self.averages.teacher is None:
            return None
        with mixed_precision(self.engine.device, self.precision):
            output = encode_all(self.averages.teacher.encode, parts)
            if self._compares_teacher(measure):
                ahead.begin(teacher_image=output.image, teacher_text=output.text)
        return output

    def _student(self, parts: Sequence[MicroBatch], ahead: Ahead) -> OneShot | Cached:
        """Return the student's pass over a batch; other ranks get its texts while the images are encoded.

        In micro-batches the features are whole after the last of them alone, and the loss gathers them.
        """
        engine, precision, penalised = self.engine, self.precision, self.config.penalised
        started, waited = time.perf_counter(), ahead.waited
        if len(parts) == 1:
            begin = (lambda v: ahead.begin(text=v)) if self.text_first and ranks().size > 1 else None
            student: OneShot | Cached = OneShot(engine, parts[0], precision, penalised, begin)
        else:
            student = Cached(engine, parts, precision, penalised, self._point)
        if self.config.zero_stage < 3:  # there the forward pass waits for the weights of other ranks
            self._own_seconds += time.perf_counter() - started - (ahead.waited - waited)
        return student


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
    skipped = Skipped(len(index), config.max_bad, checkpoints.skipped, here.counter())
    batches = iter(_batches(config, clip, index, done, engine.device, skipped))
    steps = range(done + 1, total + 1)
    bar = tqdm(steps, desc=title, unit="step", initial=done, total=total, disable=not here.first)
    shown = Shown(bar, config.batch_size * config.accumulation)

    def scores(step: int) -> dict[str, float]:
        if not (config.eval_every and step and (step % config.eval_every == 0 or step == total)):
            return {}
        return evaluate_now(step, engine, averages, scorer, request.leave_off)

    def save(step: int) -> None:
        here.watch.at(step, "saves")
        log.sync()  # before the checkpoint, which relies on the log's rows
        batches_done = step * config.accumulation
        for rows in here.everyones(skipped.rows(batches_done)):
            skipped.learn(rows)  # as a run that goes on from this checkpoint does
        checkpoints.save(step, engine, averages.by_name(), skipped.rows(batches_done))

    with bar, stop_requests(not here.first, here.rank, here.size) as request:
        here.watch.request = request
        try:
            if not here.once(lambda: log.evaluated):  # the attempt before was asked to stop meanwhile
                log.amend(scores(done))
            request.point()
            for step in bar:
                measure = step % MEASURE_EVERY == 0 or step == total
                scalars = trainer.step(step, islice(batches, config.accumulation), measure, request.point)
                log.write(done := step, scalars | scores(step))
                shown.update(scalars["loss"], log.skipped)
                if log.skipped_in_a_row >= config.max_skipped:
                    _end_not_finite(trainer, step, log.skipped_in_a_row, index)
                if step % config.save_every == 0 or step == total:
                    save(step)
                request.point()
        except StopHere:
            if done > checkpoints.step:
                save(done)
            raise _stopped(request.signal, done, total) from None
    signals = [number for number in here.everyones(request.signal) if number]
    if signals:  # after the last point, and perhaps to one rank alone: the others would wait for it
        raise _stopped(signals[0], done, total)
    if log.skipped == total:
        _end_not_finite(trainer, total, total, index)
    last, student, teacher = gathered(engine, averages)
    trained = Trained(
        student=student,
        teacher=teacher,
        last=last,
        sizes=optimizer_sizes(engine) | {"checkpoint_bytes": checkpoints.nbytes()},
    )
    engine.destroy()  # its hooks would keep model and optimizer in memory, in a comparison for every run
    return trained


def _batches(
    config: Config, clip: Clip, index: Index, done: int, device: torch.device, skipped: Skipped
) -> TrainingBatches:
    """Return the batches of the steps after ``done``."""
    here = ranks()
    return TrainingBatches(
        index,
        clip,
        batch_size=config.batch_size,
        steps=config.total_steps * config.accumulation,
        first=done * config.accumulation,
        seed=config.seed,
        crop_scale=config.crop_scale,
        workers=config.workers,
        device=device,
        rank=here.rank,
        world_size=here.size,
        loading=config,
        variation=Variation(config.crop_scale, config.flip, config.color_jitter, config.shuffle_window),
        skipped=skipped,
    )


def gathered(engine: DeepSpeedEngine, averages: Averages) -> tuple[Weights, Weights, Weights | None]:
    """Return the last step's weights, the student's to keep, and the teacher's; call it on every rank."""
    last = without_fusion(full_weights(engine))
    student = averages.student.gather() if averages.student else last
    return last, student, without_fusion(averages.teacher.gather()) if averages.teacher else None


def evaluate_now(
    step: int,
    engine: DeepSpeedEngine,
    averages: Averages,
    scorer: Scorer | None,
    leave_off: Callable[[], None],
) -> dict[str, float]:
    """Return the scores of the present weights as scalars to log, measured by the first rank; call it on all.

    They are empty where ``leave_off`` has ended the evaluation, since the run is about to stop.
    """
    ranks().watch.at(step, "evaluates")
    _, student, teacher = gathered(engine, averages)

    def measure() -> dict[str, float]:
        try:
            return scorer.during(step, student, teacher, leave_off) if scorer else {}
        except StopHere:
            return {}

    return ranks().once(measure)


def _stopped(number: int | None, done: int, total: int) -> Stopped:
    assert number is not None  # the signal that asked for it
    return Stopped(stopped_after(done, total), number, saved=done > 0, together=True)


def stopped_after(done: int, total: int) -> str:
    """Return the last word of a run that a signal has stopped after ``done`` of its steps."""
    what = (
        f"after step {done} of {total}, which is saved" if done else "in the first step; nothing is saved yet"
    )
    return f"stopped {what}; the same command goes on from there"


def _end_not_finite(trainer: Trainer, step: int, skipped: int, index: Index) -> None:
    """End the run on all ranks after ``skipped`` steps in a row; names the pairs without finite features, if any.

    Raises:
        Diverged: always; names the pairs of all ranks.
    """
    here, config = ranks(), trainer.config
    chosen = [n for rows in here.everyones(trainer.not_finite()) for n in rows]
    whose = ", whose features are not finite" if chosen else ""
    chosen = chosen or [n for rows in here.everyones(trainer.pictures) for n in rows]
    named = ", ".join(f"'{index.id(n)}'" for n in chosen[:3]) or "no pictures"
    more = f" and {len(chosen) - 3} more" * (len(chosen) > 3)
    trainer.engine.destroy()  # as after the last step: a sweep goes on
    batches = f"batch {step}" if config.accumulation == 1 else f"the {config.accumulation} batches"

    def end() -> None:
        raise Diverged(
            f"the loss or its gradient was not finite in {counted(skipped, 'step')} in a row; the last is "
            f"step {step}, {batches} with {named}{more}{whose}: lower --lr, give a --clip_grad above 0, or check "
            "the start's weights (--max_skipped sets the bound)"
        )

    here.agree(end)


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


def objective(config: Config, model: nn.Module) -> TracerLoss:
    """Return the loss that ``config`` describes; without a teacher, it is the contrastive term alone.

    Penalties on the projections are left out where the model has no such matrices, or adapters leave them frozen.

    Raises:
        UserError: settings that have no meaning for the model's form of the contrastive term.
    """
    contrast = config.contrast or contrast_of(model)
    # R-Adapter's own ε is for its softmaxes: only one that the user chose has lost its meaning.
    if contrast == "sigmoid" and config.smoothing:
        raise UserError(
            f"--smoothing {config.smoothing} has no meaning for the sigmoid of each pair: leave it out, or give "
            "--contrast softmax"
        )
    if contrast == "softmax" and config.logit_bias is not None:
        raise UserError(
            f"--logit_bias {config.logit_bias} changes no softmax: leave it out, or give --contrast sigmoid"
        )
    penalised = config.penalised and projections(model) is not None
    return TracerLoss(
        **across_ranks(config),
        distill_weight=config.distill_weight if config.method == "tracer" else 0.0,
        relational=config.relational,
        feature=config.feature,
        interactive=config.interactive,
        cross=config.cross,
        projection_product=config.projection_product if penalised else 0.0,
        projection_orthogonal=config.projection_orthogonal if penalised else 0.0,
        teacher_temperature=config.teacher_temperature,
        margin=config.recipe.margin,
        smoothing=0.0 if contrast == "sigmoid" else config.recipe.smoothing,
        contrast=contrast,
    )


def with_bias(
    features: Features | BiasedFeatures, config: Config
) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
    """Return features, σ and the logit bias: the model's, or for a model that has none the settings'."""
    u, v, scale, *bias = features
    fixed = recipes.SIGLIP_BIAS if config.logit_bias is None else config.logit_bias
    return u, v, scale, bias[0] if bias else fixed


def across_ranks(config: Config) -> dict[str, Any]:
    """Return the arguments by which the loss compares the pairs of all ranks."""
    return {"group": dist.group.WORLD, "mesh": config.mesh_shape} if ranks().size > 1 else {}


@torch.no_grad()
def teacher_gap(
    engine: DeepSpeedEngine, teacher: MovingAverageTeacher, parts: Sequence[MicroBatch], config: Config
) -> Tensor:
    """Return KL(teacher ‖ student) on a batch in nats, mean of both directions, without mixed precision.

    The relational term of a mixed-precision step cannot show a gap below the rounding of its logits.
    """
    engine.eval()
    student_output = encode_all(engine.module, parts)[:3]
    teacher_image, teacher_text, teacher_logit_scale = encode_all(teacher.encode, parts)[:3]
    engine.train()
    return contrastive_loss(
        *student_output,
        teacher_image=teacher_image,
        teacher_text=teacher_text,
        teacher_logit_scale=teacher_logit_scale,
        relational=1.0,
        **across_ranks(config),
    ).terms["relational"]
