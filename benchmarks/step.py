"""A whole training step against the published one, and where its time and memory go.

    python -m benchmarks.step                                    ViT-B/32, the demo's model, projections alone
    python -m benchmarks.step --quick
    python -m benchmarks.step --cases '[ViT-B-16:64, tracer-demo:1024]' --precision fp32

The steps train the same model on the same batch with the same AdamW, in bare torch, not through DeepSpeed:

* plain: the contrastive loss alone (``tracer.ops``), no teacher;
* tracer: the whole fused objective, the moving-average teacher and its forward pass, and the diagnostics that
  the loss measures on its way;
* published: the same objective term by term in eager torch (``published.py``), its diagnostics with a host
  sync each, and its teacher tensor by tensor (``published_step.py``);
* the latter two also without diagnostics.

A phase is timed where it happens, in turns with the other steps. The backward pass is done in two parts, loss →
features → weights, which changes no gradient. Loading is timed alone: it would use the same cores. Before any
speed is printed, one step of tracer and one of published from the same start must give the same loss,
gradients, weights and teacher.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import loader, published, published_step
from benchmarks._measure import (
    TOTAL,
    Timing,
    interleaved,
    interleaved_phases,
    peak_memory,
    require_close,
    table,
)
from benchmarks._part import Highlight, command_line, progress
from tracer.data.batches import TrainingBatches
from tracer.data.index import Index
from tracer.losses import TracerLoss
from tracer.machine import compute_device, resolve_precision
from tracer.models.clip import Clip, encode, load_clip, projections
from tracer.ops import contrastive_loss, sampled_diagnostics
from tracer.recipes import TRACER
from tracer.schedules import WMA
from tracer.teacher import build_teacher
from tracer.train.engine import adamw, mixed_precision

HEADS = "projections"  # of the towers' stored features: nothing but the last layer of a CLIP is trained
CASES = ("ViT-B-32:32", "tracer-demo:128", "tracer-demo:1024", f"{HEADS}:4096")
QUICK = ("tracer-demo:128", f"{HEADS}:4096")
PLAIN, OURS, PUBLISHED = "plain", "tracer", "published"
BARE_OURS, BARE_PUBLISHED = "tracer, no diagnostics", "published, no diagnostics"
STEPS = (PLAIN, OURS, BARE_OURS, PUBLISHED, BARE_PUBLISHED)
PHASES = (
    "student forward", "teacher forward", "loss", "diagnostics", "student backward", "optimizer", "teacher update"
)  # fmt: skip
DATA = "loading"
LENGTH = 100_000  # steps of the run that the teacher's schedule is for
TARGET = 0.03  # what the TRACER step may cost beyond the plain one and the teacher's forward pass
# Relative to ‖published‖; both round their products to 8 bits under autocast. Adam's first step is about the sign
# of a gradient, so the rounding of gradients near zero shows in the change of the weights (1.1e-4 found).
TOLERANCE = {"fp32": 1e-3, "amp_bf16": 3e-2}
LR = TRACER.lr


class Case(NamedTuple):
    """A model and how many pairs it sees in a step."""

    model: str
    pairs: int

    @classmethod
    def of(cls, text: str) -> Case:
        model, _, pairs = text.rpartition(":")
        if not model or not pairs.isdigit() or int(pairs) < 2:
            raise SystemExit(f"case '{text}': write model:pairs, such as ViT-B-32:32, with at least 2 pairs")
        return cls(model, int(pairs))

    def __str__(self) -> str:
        return f"{self.model}, {self.pairs} pairs"


def batches(clip: Clip, pairs: int, count: int, folder: Path) -> TrainingBatches:
    """Pictures through the package's loader: JPEGs, or the demo's icons for a model that sees small ones."""
    small = clip.picture_format.size < 64
    files = loader.icons(folder, 256)[1] if small else loader.photographs(folder, 64)
    index = Index(
        "pictures",
        [files[i % len(files)] for i in range(pairs)],
        [str(i) for i in range(pairs)],
        [[f"drawing number {i} of a series of {pairs}"] for i in range(pairs)],
    )
    return TrainingBatches(
        index,
        clip,
        batch_size=pairs,
        steps=count,
        seed=0,
        crop_scale=loader.CROP,
        workers=len(os.sched_getaffinity(0)),
        device=compute_device(),
    )


class Heads(nn.Module):
    """The projections of a ViT-B/32 into the shared space, [768, 512] and [512, 512], and the logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.visual: Any = nn.Module()
        self.visual.proj = nn.Parameter(torch.randn(768, 512) / 768**0.5)
        self.text_projection = nn.Parameter(torch.randn(512, 512) / 512**0.5)
        self.logit_scale = nn.Parameter(torch.full((1,), 14.0).log())

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return image @ self.visual.proj, text @ self.text_projection, self.logit_scale.exp()


class Problem(NamedTuple):
    """A model on its device, a batch for it, and the seconds it takes to load one."""

    model: nn.Module
    image: Tensor
    text: Tensor
    loading: Timing | None


def problem(case: Case, timed: bool = False) -> Problem:
    """Random weights (the demo's own for tracer-demo) and real pictures; for the heads random features."""
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
        seconds = loading(case, clip, Path(folder)) if timed else None
    return Problem(clip.model.to(device).train(), batch.image, batch.text, seconds)


class Trainer:
    """One student, its optimizer and both kinds of teacher: all steps train the same weights."""

    def __init__(self, problem: Problem, precision: str) -> None:
        torch.manual_seed(0)
        self.device, self.precision = problem.image.device, precision
        self.model, self.image, self.text, self.loading = problem
        self.teacher = build_teacher(self.model, WMA(LENGTH))
        # Weights that ask for gradients, so that torch multiplies this teacher's as fast as ours (see teacher.py).
        self.eager_teacher = copy.deepcopy(self.model).eval()
        with torch.no_grad():  # a student that has moved away from its teacher
            for param in self.model.parameters():
                param.add_(torch.randn_like(param), alpha=0.05 * float(param.std(unbiased=False)))
        self.objective = TracerLoss()
        self.done = 0
        self.restart()

    def restart(self) -> None:
        """A new AdamW, as the trainer sets it up."""
        self.optimizer = adamw(self.model, LR, weight_decay=TRACER.weight_decay)
        self.optimizer.zero_grad()

    def phases(self, kind: str) -> dict[str, Callable[[], None]]:
        """The parts of a step in their order."""
        now = SimpleNamespace()  # what a part leaves to the next
        ours, distilled, measured = kind in (OURS, BARE_OURS), kind != PLAIN, kind in (OURS, PUBLISHED)

        def student_forward() -> None:
            with mixed_precision(self.device, self.precision):
                now.features = encode(self.model, self.image, self.text)
            now.leaves = [x.detach().requires_grad_() for x in now.features]

        def teacher_forward() -> None:
            with mixed_precision(self.device, self.precision), torch.no_grad():
                forward = self.teacher.encode if ours else self.eager_teacher
                now.guide = encode(forward, self.image, self.text)

        def loss() -> None:
            with mixed_precision(self.device, self.precision):
                if kind == PLAIN:
                    now.loss = contrastive_loss(*now.leaves).loss
                elif ours:
                    penalised = projections(self.model)
                    now.loss, _, now.stats = self.objective(
                        *now.leaves, now.guide, projections=penalised, stats=measured
                    )
                else:
                    now.loss = self.published_loss(now.leaves, now.guide)
            now.loss.backward()
            self.loss = now.loss.detach()

        def diagnostics() -> None:
            features = [x.detach() for x in now.features]
            with mixed_precision(self.device, self.precision):
                if ours:
                    now.stats |= sampled_diagnostics(*features[:2], *now.guide[:2])
                else:
                    now.stats = published_step.diagnostics(*features, *now.guide)

        def student_backward() -> None:
            torch.autograd.backward(now.features, [x.grad for x in now.leaves])
            now.features = now.leaves = None

        def optimizer() -> None:
            self.optimizer.step()
            self.optimizer.zero_grad()

        def teacher_update() -> None:
            self.done += 1
            if ours:
                self.teacher.update(self.done)
            else:
                weight = self.teacher.schedule.weight(self.done)
                published_step.update_teacher(self.eager_teacher, self.model, weight)

        steps = (
            student_forward,
            teacher_forward,
            loss,
            diagnostics,
            student_backward,
            optimizer,
            teacher_update,
        )
        left_out = {diagnostics} if not measured else set()
        left_out |= {teacher_forward, teacher_update} if not distilled else set()
        return {name: step for name, step in zip(PHASES, steps, strict=True) if step not in left_out}

    def published_loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The objective term by term, its penalty on the projections included."""
        weights = self.objective.distill_weights
        value = published.tracer_loss(*student, *teacher, **weights)  # type: ignore[arg-type]
        matrices = projections(self.model)
        if matrices is None:
            return value
        return value + self.objective.projection_product * torch.linalg.matrix_norm(
            matrices[0] @ matrices[1].T
        )

    def check(self, what: str) -> None:
        """One step of ours and one published from the same start. SystemExit where they part.

        In fp32 loss, gradients, and how far weights and teacher move; in the timed precision loss and
        gradients: Adam's first step is the gradients' sign, and so is that of their rounding errors.
        """
        timed = self.precision
        for precision in dict.fromkeys(("fp32", timed)):
            self.precision = precision
            ours, theirs = (self._one(kind, precision == "fp32") for kind in (BARE_OURS, BARE_PUBLISHED))
            for name, expected in theirs.items():
                require_close(f"{what}, {precision}: {name}", ours[name], expected, TOLERANCE[precision])
        self.precision = timed

    def _one(self, kind: str, whole: bool) -> dict[str, Tensor]:
        """What a step has found and moved, after which the weights are as before; ``whole`` with its updates."""
        moving = self.teacher.module if kind == BARE_OURS else self.eager_teacher
        start = [p.detach().clone() for p in self.model.parameters()]
        average = _flat(moving.parameters())
        steps = self.phases(kind)
        self.done = 0
        for name in PHASES[: PHASES.index("optimizer")]:
            steps.get(name, lambda: None)()
        found = {"loss": self.loss, "gradients": _flat(p.grad for p in self.model.parameters())}
        if whole:
            steps["optimizer"]()
            steps["teacher update"]()
            found["change of the weights"] = _flat(self.model.parameters()) - _flat(start)
            found["change of the teacher"] = _flat(moving.parameters()) - average
            with torch.no_grad():
                for param, before in zip(self.model.parameters(), start, strict=True):
                    param.copy_(before)
        self.restart()
        return found


def _flat(tensors: Iterable[Tensor | None]) -> Tensor:
    """All elements in one vector; a copy."""
    return torch.cat([t.detach().flatten() for t in tensors if t is not None])


def step_call(model: str, pairs: int, precision: str, kind: str) -> Callable[[], None]:
    """For :func:`benchmarks._measure.peak_memory`: a step, after one that has allocated what stays."""
    trainer = Trainer(problem(Case(model, pairs)), precision)
    steps = trainer.phases(kind)

    def call() -> None:
        for phase in steps.values():
            phase()

    call()
    return call


def kept_bytes(trainer: Trainer) -> int:
    """Bytes that the student's forward pass keeps for its backward pass, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        mixed_precision(trainer.device, trainer.precision),
    ):
        features = encode(trainer.model, trainer.image, trainer.text)
    del features
    return sum(kept.values())


def held(trainer: Trainer) -> dict[str, int]:
    """Bytes, counted, that lie there during a step, by what they are for."""
    weights = sum(p.nbytes for p in trainer.model.parameters())
    state = [x for values in trainer.optimizer.state.values() for x in values.values()]
    return {
        "parameters": weights,
        "gradients": weights,
        "optimizer": sum(x.nbytes for x in state if isinstance(x, Tensor)),
        "teacher": sum(x.nbytes for x in trainer.teacher.gather().values()),
        "activations": kept_bytes(trainer),
    }


def memory(case: Case, trainer: Trainer) -> dict[str, Any]:
    """What is held, and by kind of step the peak beyond parameters, optimizer and teachers, measured."""
    peaks = {
        kind: peak_memory("benchmarks.step", "step_call", case.model, case.pairs, trainer.precision, kind)
        for kind in (PLAIN, OURS, PUBLISHED)
    }
    return {"held": held(trainer), "peak": peaks}


def loading(case: Case, clip: Clip, folder: Path) -> Timing:
    """Seconds to load one batch, nothing else running."""
    count = max(2, 256 // case.pairs)

    def epoch() -> None:
        for _ in batches(clip, case.pairs, count, folder):
            pass

    time = interleaved({DATA: epoch}, repeats=3)[DATA]
    return Timing(time.median / count, time.low / count, time.high / count, time.repeats)


def measure_case(case: Case, precision: str, repeats: int, budget: float, quick: bool) -> dict[str, Any]:
    """Everything about one model and batch."""
    trainer = Trainer(problem(case, timed=True), precision)
    trainer.check(str(case))
    steps = {kind: trainer.phases(kind) for kind in STEPS}
    times = interleaved_phases(steps, repeats=repeats, budget=budget, label=f"{case}: ")
    return {
        "model": case.model,
        "pairs": case.pairs,
        "precision": precision,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "loading": trainer.loading,
        "times": times,
        "memory": {} if quick else memory(case, trainer),
    }


def deepspeed_step(case: Case, precision: Any, repeats: int) -> dict[str, Timing]:
    """The plain step in bare torch and in the trainer's DeepSpeed engine (ZeRO 1, gradients clipped)."""
    from tracer.train.config import Config
    from tracer.train.engine import start_engine

    config = Config(Path(), batch_size=case.pairs, steps=LENGTH, warmup=1, precision=precision, lr=LR)
    trainer = Trainer(problem(case), precision)
    engine = start_engine(config, copy.deepcopy(trainer.model))
    image, bare = trainer.image, trainer.phases(PLAIN)

    def in_engine() -> None:
        with mixed_precision(trainer.device, trainer.precision):
            loss = contrastive_loss(*encode(engine, image, trainer.text)).loss
        engine.backward(loss)
        engine.step()

    def in_torch() -> None:
        for phase in bare.values():
            phase()

    return interleaved({"bare torch": in_torch, "DeepSpeed": in_engine}, repeats=repeats)


def measure(
    *,
    quick: bool = False,
    cases: list[str] | None = None,
    precision: str = "auto",
    repeats: int | None = None,
    budget: float = 20.0,
) -> dict[str, Any]:
    """Time the steps of each case in turns, phase by phase.

    Args:
        quick: the small model and the projections alone, fewer turns, no memory.
        cases: model:pairs; any open_clip model with random weights, tracer-demo, or projections, which trains
            the last layer of a ViT-B/32 alone, on stored features.
        precision: fp32, amp_bf16, or auto: as the trainer chooses on this machine.
        repeats: turns of each step; default: 9, quick 3.
        budget: seconds for the turns of one case, at most; three turns are always taken.
    """
    chosen = [Case.of(text) for text in cases or (QUICK if quick else CASES)]
    precision, repeats = resolve_precision(precision), repeats or (3 if quick else 9)
    found = []
    for case in chosen:
        progress(f"step: {case}")
        found.append(measure_case(case, precision, repeats, budget, quick))
    small = [case for case in chosen if case.model == "tracer-demo"][:1]
    return {
        "cases": found,
        "engine": [[str(case), deepspeed_step(case, precision, repeats)] for case in small],
    }


def _time(case: dict[str, Any], kind: str, phase: str = TOTAL) -> Timing:
    """Of a phase that a step does not have: nothing."""
    return Timing(**case["times"][kind].get(phase, {"median": 0.0, "low": 0.0, "high": 0.0, "repeats": 0}))


def overhead(case: dict[str, Any], kind: str) -> tuple[float, float, float]:
    """What a TRACER step costs beyond the plain one and the teacher's forward, in shares of the plain one.

    Of the phases in which the two differ: loss, diagnostics and the teacher's update; median, low, high.
    The others do the same work, and their differences are the machine's mood.
    """
    more = [_time(case, kind, phase) for phase in ("loss", "diagnostics", "teacher update")]
    less, whole = _time(case, PLAIN, "loss"), _time(case, PLAIN).median
    return (
        (sum(t.median for t in more) - less.median) / whole,
        (sum(t.low for t in more) - less.high) / whole,
        (sum(t.high for t in more) - less.low) / whole,
    )


def by_totals(case: dict[str, Any], kind: str) -> float:
    """The same from whole steps."""
    teacher, plain = _time(case, kind, "teacher forward").median, _time(case, PLAIN).median
    return (_time(case, kind).median - teacher - plain) / plain


def _named(case: dict[str, Any]) -> str:
    return f"{case['model']}, {case['pairs']} pairs, {case['precision']}"


def report(results: dict[str, Any]) -> str:
    """For each case the steps, their phases, what TRACER costs, and the memory."""
    parts = []
    for case in results["cases"]:
        parts += [f"### {_named(case)}", _steps(case), _phases(case), _sentences(case)]
        if case["memory"]:
            parts.append(_memory(case))
    for name, times in results["engine"]:
        bare, engine = Timing(**times["bare torch"]), Timing(**times["DeepSpeed"])
        parts.append(
            f"The trainer's engine: a plain step of {name} takes {bare} in bare torch and {engine} in DeepSpeed "
            f"(ZeRO 1, gradients clipped), {engine.median / bare.median - 1:+.0%}."
        )
    return "\n\n".join(parts)


def _steps(case: dict[str, Any]) -> str:
    rows = []
    for kind in STEPS:
        time = _time(case, kind)
        published = _time(case, BARE_PUBLISHED if kind == BARE_OURS else PUBLISHED).median
        rows.append(
            [
                kind,
                str(time),
                f"{case['pairs'] / time.median:.0f}",
                f"{time.median / _time(case, PLAIN).median:.2f}",
                f"{published / time.median:.2f}×" if kind in (OURS, BARE_OURS) else "",
            ]
        )
    return table(["step", "time", "pairs/s", "time / plain", "published / ours"], rows)


def _phases(case: dict[str, Any]) -> str:
    """Milliseconds and share of the step; loading stands apart, since it can overlap only on other cores."""
    kinds = (PLAIN, OURS, PUBLISHED)
    rows = []
    for phase in PHASES:
        cells = []
        for kind in kinds:
            time = _time(case, kind, phase)
            share = time.median / _time(case, kind).median
            cells.append(f"{time} {share:.1%}" if time.repeats else "")
        rows.append([phase, *cells])
    if case["loading"]:
        rows.append([f"{DATA}, besides", *[str(Timing(**case["loading"]))] * 3])
    return table(["phase", *kinds], rows)


def _sentences(case: dict[str, Any]) -> str:
    median, low, high = overhead(case, OURS)
    bare = overhead(case, BARE_OURS)[0]
    share = _time(case, OURS, "loss").median / _time(case, OURS).median
    verdict = "is not the bottleneck" if share < 0.1 else "matters"
    return (
        f"Beyond the teacher's forward pass, the TRACER step costs {median:.1%} ({low:.1%}–{high:.1%}) more than "
        f"the plain one, {bare:.1%} without diagnostics (target: at most {TARGET:.0%}; from whole steps: "
        f"{by_totals(case, OURS):.1%}). The fused loss takes {share:.1%} of it: here the loss {verdict}."
    )


def _memory(case: dict[str, Any]) -> str:
    held, peak = case["memory"]["held"], case["memory"]["peak"]
    rows = [[name, f"{size / 2**20:.1f} MiB"] for name, size in held.items()]
    rows += [
        [f"peak of a {kind} step beyond parameters, optimizer and teacher", f"{size / 2**20:.1f} MiB"]
        for kind, size in peak.items()
    ]
    return table(["memory", ""], rows)


def highlights(results: dict[str, Any]) -> list[Highlight]:
    """A row per case."""
    rows = []
    for case in results["cases"]:
        ours, theirs = _time(case, OURS), _time(case, PUBLISHED)
        rows.append(
            Highlight(
                f"training step, {_named(case)}",
                str(ours),
                f"published step: {theirs}",
                f"{theirs.median / ours.median:.1f}×",
            )
        )
    return rows


# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#56B4E9", "#009E73", "#D55E00", "#F0E442", "#0072B2", "#999999", "#CC79A7")


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """Where the time goes, and the memory where it was measured: stacked bars."""
    from matplotlib.figure import Figure

    cases = results["cases"]
    figure = Figure(figsize=(9, 0.8 + 1.5 * len(cases)), layout="constrained")
    kinds = (PUBLISHED, OURS, PLAIN)
    for axes, case in zip(figure.subplots(len(cases), 1, squeeze=False)[:, 0], cases, strict=True):
        start = [0.0] * len(kinds)
        for phase, colour in zip(PHASES, COLOURS, strict=True):
            seconds = [_time(case, kind, phase).median for kind in kinds]
            axes.barh(kinds, seconds, left=start, color=colour, label=phase)
            start = [a + b for a, b in zip(start, seconds, strict=True)]
        axes.set_title(_named(case), fontsize="medium")
        axes.set_xlabel("seconds per step")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    found = {"where-time-goes": figure}
    if measured := [case for case in cases if case["memory"]]:
        found["where-memory-goes"] = _memory_figure(measured)
    return found


def _memory_figure(cases: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + 0.5 * len(cases)), layout="constrained")
    axes = figure.subplots()
    start = [0.0] * len(cases)
    names = [_named(case) for case in cases]
    for part, colour in zip(cases[0]["memory"]["held"], COLOURS, strict=False):
        sizes = [case["memory"]["held"][part] / 2**30 for case in cases]
        axes.barh(names, sizes, left=start, color=colour, label=part)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    axes.set_xlabel("GiB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=5, frameon=False)
    return figure


def exact(results: dict[str, Any]) -> dict[str, float]:
    """Nothing: what a step keeps depends on how this machine multiplies."""
    return {}


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """The published step's time divided by ours."""
    return {
        f"{case['model']}, {case['pairs']} pairs": _time(case, PUBLISHED).median / _time(case, OURS).median
        for case in results["cases"]
    }


if __name__ == "__main__":
    command_line(measure, report)
