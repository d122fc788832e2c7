"""The training steps that ``step.py`` compares: their model, batch and optimizer, and the phases of each step."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tracer.demo.small_clip  # noqa: F401 (registers the model tracer-demo)
from benchmarks import pictures, published
from benchmarks.measure import Timing, interleaved, require_close
from tracer._frozen import multiply_once
from tracer.data.batches import TrainingBatches
from tracer.data.build import collect
from tracer.data.sample import Sample
from tracer.losses import TracerLoss
from tracer.machine import compute_device
from tracer.models.clip import Clip, encode, load_clip, projections
from tracer.ops import contrastive_loss, sampled_diagnostics
from tracer.schedules import WMA
from tracer.teacher import build_teacher
from tracer.train.engine import adamw, mixed_precision

HEADS = "projections"  # a case that trains only the last layer of a CLIP, on stored features of its towers
PLAIN, OURS, PUBLISHED = "plain", "tracer", "published"
BARE_OURS, BARE_PUBLISHED = "tracer, no diagnostics", "published, no diagnostics"
STEPS = (PLAIN, OURS, BARE_OURS, PUBLISHED, BARE_PUBLISHED)
PHASES = (
    "student forward", "teacher forward", "loss", "diagnostics", "student backward", "optimizer", "teacher update"
)  # fmt: skip
LENGTH = 100_000  # steps of the run that the teacher's schedule is made for
LR, WEIGHT_DECAY = 1e-5, 0.1
# Relative to ‖published‖; both steps round their products to 8 bits under autocast. The first step of Adam follows
# the sign of each gradient, so the rounding of gradients near zero shows in the change of the weights.
TOLERANCE = {"fp32": 1e-3, "amp_bf16": 3e-2}


def whole_objective(model: nn.Module) -> TracerLoss:
    """Return the published objective; a model without projection matrices has no penalty on them."""
    return TracerLoss() if projections(model) else TracerLoss(projection_product=0.0)


class Case(NamedTuple):
    """A model and the number of pairs that it sees in a step."""

    model: str
    pairs: int

    @classmethod
    def of(cls, text: str) -> Case:
        """Read a case written as model:pairs.

        Raises:
            SystemExit: it is written in another way.
        """
        model, _, pairs = text.rpartition(":")
        if not model or not pairs.isdigit() or int(pairs) < 2:
            raise SystemExit(f"case '{text}': write model:pairs, such as ViT-B-32:32, with at least 2 pairs")
        return cls(model, int(pairs))

    def __str__(self) -> str:
        return f"{self.model}, {self.pairs} pairs"


class Problem(NamedTuple):
    """A model on its device, a batch for it, and the time to load one such batch, if that was asked for."""

    model: nn.Module
    image: Tensor
    text: Tensor
    loading: Timing | None


def problem(case: Case, timed: bool = False) -> Problem:
    """Build a case: random weights (the demo's own for tracer-demo) and pictures; for the heads random features.

    ``timed``: also measure the time to load a batch.
    """
    torch.manual_seed(0)
    device = compute_device()
    if case.model == HEADS:
        model = Heads().to(device)
        concept = torch.randn(case.pairs, 64)
        features = [
            concept @ torch.randn(64, width) / 8 + torch.randn(case.pairs, width) for width in (768, 512)
        ]
        return Problem(model, features[0].to(device), features[1].to(device), None)
    clip = load_clip(case.model, None)
    with tempfile.TemporaryDirectory() as folder:
        batch = next(iter(batches(clip, case.pairs, 1, Path(folder))))
        loading = _loading(case, clip, Path(folder)) if timed else None
    multiply_once(clip.model)  # as a run does, whatever trains
    return Problem(clip.model.to(device).train(), batch.image, batch.text, loading)


class Heads(nn.Module):
    """The projections of a ViT-B/32 into the shared space, [768, 512] and [512, 512], and the logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.visual: Any = nn.Module()
        self.visual.proj = nn.Parameter(torch.randn(768, 512) / 768**0.5)
        self.text_projection = nn.Parameter(torch.randn(512, 512) / 512**0.5)
        self.logit_scale = nn.Parameter(torch.full((1,), 14.0).log())

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project the features of the towers, [N, 768] and [N, 512]."""
        return image @ self.visual.proj, text @ self.text_projection, self.logit_scale.exp()


def batches(clip: Clip, pairs: int, count: int, folder: Path) -> TrainingBatches:
    """Load pictures with the package's loader: JPEGs, or the demo's icons for a model with small input."""
    small = clip.picture_format.size < 64
    files = pictures.icons(folder, 256)[1] if small else pictures.photographs(folder, 64)
    captions = [f"drawing number {i} of a series of {pairs}" for i in range(pairs)]
    index = collect(
        "pictures",
        # Every pair is a sample of its own, also where a file comes again: a key keeps them apart.
        (Sample(str(files[i % len(files)]), str(i), (captions[i],), key=str(i)) for i in range(pairs)),
    )
    return TrainingBatches(
        index,
        clip,
        batch_size=pairs,
        steps=count,
        seed=0,
        crop_scale=pictures.CROP,
        workers=len(os.sched_getaffinity(0)),
        device=compute_device(),
    )


def _loading(case: Case, clip: Clip, folder: Path) -> Timing:
    """Measure the time to load one batch while nothing else runs."""
    count = max(2, 256 // case.pairs)

    def epoch() -> None:
        for _ in batches(clip, case.pairs, count, folder):
            pass

    time = interleaved({"loading": epoch}, repeats=3)["loading"]
    return Timing(time.median / count, time.low / count, time.high / count, time.repeats)


def kept_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Count the bytes, the model's weights apart, that a forward pass keeps for its backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = forward()
    del outputs
    return sum(kept.values())


class Trainer:
    """A student, its optimizer and both kinds of teacher. All steps train the same weights."""

    def __init__(self, problem: Problem, precision: str) -> None:
        torch.manual_seed(0)
        self.device, self.precision = problem.image.device, precision
        self.model, self.image, self.text, self.loading = problem
        self.teacher = build_teacher(self.model, WMA(LENGTH))
        # Its weights ask for gradients, so that torch multiplies them as fast as those of tracer.teacher, which
        # says why.
        self.published_teacher = copy.deepcopy(self.model).eval()
        with torch.no_grad():  # moves the student away from its teacher
            for param in self.model.parameters():
                param.add_(torch.randn_like(param), alpha=0.05 * float(param.std(unbiased=False)))
        self.objective = whole_objective(self.model)
        self.updates = 0  # of a teacher, by any step
        self.restart()

    def restart(self) -> None:
        """Replace the optimizer by a new one, the AdamW of the package's own training."""
        self.optimizer = adamw(self.model, LR, WEIGHT_DECAY)
        self.optimizer.zero_grad()

    def encode(self) -> Any:
        """Return the student's features of the batch."""
        with mixed_precision(self.device, self.precision):
            return encode(self.model, self.image, self.text)

    def phases(self, kind: str) -> dict[str, Callable[[], None]]:
        """Return the phases of a kind of step by name, in order."""
        return Step(self, kind).phases()

    def check(self, what: str) -> None:
        """Compare one step of TRACER with a published step from the same start.

        In fp32 the loss, the gradients, and the changes of weights and teacher must agree. In the timed
        precision only loss and gradients must: the first step of Adam is the sign of each gradient, and so that
        of rounding errors.

        Raises:
            WrongResult: they disagree; ends the benchmark.
        """
        timed = self.precision
        for precision in dict.fromkeys(("fp32", timed)):
            self.precision = precision
            whole = precision == "fp32"
            ours, expected = self._outcome(BARE_OURS, whole), self._outcome(BARE_PUBLISHED, whole)
            for name, value in expected.items():
                require_close(f"{what}, {precision}: {name}", ours[name], value, TOLERANCE[precision])
        self.precision = timed

    def _outcome(self, kind: str, whole: bool) -> dict[str, Tensor]:
        """Take a step, put the weights back, and return its loss, gradients and, if ``whole``, its changes."""
        teacher = self.teacher.module if kind == BARE_OURS else self.published_teacher
        start = [p.detach().clone() for p in self.model.parameters()]
        average = _flat(teacher.parameters())
        step = Step(self, kind)
        phases = step.phases()
        self.updates = 0
        for name in PHASES[: PHASES.index("optimizer")]:
            phases.get(name, lambda: None)()
        outcome = {"loss": step.loss.detach(), "gradients": _flat(p.grad for p in self.model.parameters())}
        if whole:
            phases["optimizer"]()
            phases["teacher update"]()
            outcome["change of the weights"] = _flat(self.model.parameters()) - _flat(start)
            outcome["change of the teacher"] = _flat(teacher.parameters()) - average
            with torch.no_grad():
                for param, before in zip(self.model.parameters(), start, strict=True):
                    param.copy_(before)
        self.restart()
        return outcome


class Step:
    """A step of one kind. Each method is a phase, and leaves to later phases what they need."""

    def __init__(self, trainer: Trainer, kind: str) -> None:
        self.trainer = trainer
        self.plain = kind == PLAIN
        self.fused = kind in (OURS, BARE_OURS)
        self.measured = kind in (OURS, PUBLISHED)
        self.features: Any = None  # of the student: image, text, logit scale
        self.leaves: Any = None  # the same, cut off from the model
        self.teacher_output: Any = None
        self.diagnostics: dict[str, Any] = {}
        self.loss: Any = None

    def phases(self) -> dict[str, Callable[[], None]]:
        """Return the phases by name, in order."""
        methods = (
            self.forward_student,
            self.forward_teacher,
            self.compute_loss,
            self.diagnose,
            self.backward_student,
            self.optimize,
            self.update_teacher,
        )
        left_out = {"teacher forward", "teacher update"} if self.plain else set()
        if not self.measured:
            left_out.add("diagnostics")
        return {name: call for name, call in zip(PHASES, methods, strict=True) if name not in left_out}

    def forward_student(self) -> None:
        """Compute the student's features."""
        with self._autocast():
            self.features = encode(self.trainer.model, self.trainer.image, self.trainer.text)
        self.leaves = [x.detach().requires_grad_() for x in self.features]

    def forward_teacher(self) -> None:
        """Compute the teacher's features."""
        forward = self.trainer.teacher.encode if self.fused else self.trainer.published_teacher
        with self._autocast(), torch.no_grad():
            self.teacher_output = encode(forward, self.trainer.image, self.trainer.text)

    def compute_loss(self) -> None:
        """Compute the loss and the gradients of the features, and of the projections that it penalises."""
        with self._autocast():
            if self.plain:
                self.loss = contrastive_loss(*self.leaves).loss
            elif self.fused:
                self.loss, _, self.diagnostics = self.trainer.objective(
                    *self.leaves,
                    self.teacher_output,
                    projections=projections(self.trainer.model),
                    stats=self.measured,
                )
            else:
                self.loss = self._published_loss(self.leaves, self.teacher_output)
        self.loss.backward()

    def _published_loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the objective term by term, with its penalty on the projections."""
        objective = self.trainer.objective
        value = published.tracer_loss(*student, *teacher, **objective.distill_weights)  # type: ignore[arg-type]
        matrices = projections(self.trainer.model)
        if matrices is None:
            return value
        return value + objective.projection_product * torch.linalg.matrix_norm(matrices[0] @ matrices[1].T)

    def diagnose(self) -> None:
        """Compute the diagnostics; the fused loss has already measured most of its own."""
        features = [x.detach() for x in self.features]
        with self._autocast():
            if self.fused:
                self.diagnostics |= sampled_diagnostics(*features[:2], *self.teacher_output[:2])
            else:
                self.diagnostics = published.diagnostics(*features, *self.teacher_output)

    def backward_student(self) -> None:
        """Compute the gradients of the weights from those of the features."""
        torch.autograd.backward(self.features, [x.grad for x in self.leaves])
        self.features = self.leaves = None

    def optimize(self) -> None:
        """Move the student's weights."""
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()

    def update_teacher(self) -> None:
        """Move the teacher towards the student."""
        trainer = self.trainer
        trainer.updates += 1
        if self.fused:
            trainer.teacher.update(trainer.updates)
        else:
            weight = trainer.teacher.schedule.weight(trainer.updates)
            published.update_teacher(trainer.published_teacher, trainer.model, weight)

    def _autocast(self) -> Any:
        return mixed_precision(self.trainer.device, self.trainer.precision)


def _flat(tensors: Iterable[Tensor | None]) -> Tensor:
    """Return a copy of all elements in one vector."""
    return torch.cat([t.detach().flatten() for t in tensors if t is not None])
