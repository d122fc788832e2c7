"""Time and memory of a whole training step, TRACER's and the published one, phase by phase.

    python -m benchmarks.step                                    ViT-B/32, the demo's model, projections alone
    python -m benchmarks.step --quick
    python -m benchmarks.step --cases '[ViT-B-16:64, tracer-demo:1024]' --precision fp32

All steps train the same model on the same batch with the same AdamW, in bare torch, not through DeepSpeed:

* plain: the contrastive loss alone (``tracer.ops``), without a teacher;
* tracer: the whole fused objective, the moving-average teacher with its forward pass, and the diagnostics that
  the loss computes along the way;
* published: the same objective term by term in eager torch, its diagnostics, each of which waits for the
  device, and its teacher tensor by tensor (``published.py``);
* tracer and published also without diagnostics.

Each phase is timed within its step, in turns with the other steps. The backward pass runs in two parts, from
the loss to the features and from there to the weights, which changes no gradient. Loading is timed alone,
because it would use the same cores. Before anything is timed, one tracer step and one published step from the
same start must give the same loss, gradients, weights and teacher.

The plain step is also timed where little trains, beside full fine-tuning: R-Adapter's, and with a locked image
tower.

The steps are in ``step_trainer.py``, the tables and pictures in ``step_page.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import command_line, progress
from benchmarks.measure import Timing, interleaved, interleaved_phases, peak_memory, require_close
from benchmarks.step_page import (
    ADAPTED,
    FULL,
    HALF,
    LOCKED,
    PICTURES,
    TAUGHT,
    figures,
    highlights,
    ratios,
    report,
)
from benchmarks.step_trainer import (
    HEADS,
    LENGTH,
    LR,
    OURS,
    PLAIN,
    PUBLISHED,
    STEPS,
    WEIGHT_DECAY,
    Case,
    Trainer,
    kept_bytes,
    problem,
    whole_objective,
)
from tracer.adapters import add_adapters
from tracer.machine import resolve_precision
from tracer.models.clip import encode, projections
from tracer.models.freezing import chain_of, freeze
from tracer.models.prefix import SharedPrefix
from tracer.ops import contrastive_loss
from tracer.schedules import WMA
from tracer.teacher import build_teacher
from tracer.train.engine import adamw, mixed_precision

__all__ = ["PICTURES", "figures", "highlights", "measure", "ratios", "report"]

CASES = ("ViT-B-32:32", "tracer-demo:128", "tracer-demo:1024", f"{HEADS}:4096")
QUICK = ("tracer-demo:128", f"{HEADS}:4096")


def measure(
    *,
    quick: bool = False,
    cases: list[str] | None = None,
    precision: str = "auto",
    repeats: int | None = None,
    budget: float = 20.0,
) -> dict[str, Any]:
    """Time the steps of each case in turns, phase by phase.

    Args: quick: only the small model and the projections, with fewer turns and without memory. cases:
    model:pairs; the model is any of open_clip, with random weights, tracer-demo, or projections, which trains
    only the last layer of a ViT-B/32, on stored features. precision: fp32, amp_bf16, or auto, which chooses as
    the trainer does on this machine. repeats: turns of each step; default: 9, quick 3. budget: seconds for the
    turns of one case; at least three turns are taken.
    """
    chosen = [Case.of(text) for text in cases or (QUICK if quick else CASES)]
    precision, repeats = resolve_precision(precision), repeats or (3 if quick else 9)
    measured = []
    for case in chosen:
        progress(f"step: {case}")
        measured.append(measure_case(case, precision, repeats, budget, quick))
    small = [case for case in chosen if case.model == "tracer-demo"][:1]
    large = [case for case in chosen if case.model not in ("tracer-demo", HEADS)][:1]
    return {
        "cases": measured,
        "frozen": [
            [str(case), each, frozen_steps(case, each, repeats, budget)]
            for case in large
            for each in ("fp32", "amp_bf16")
        ],
        "engine": [[str(case), deepspeed_step(case, precision, repeats)] for case in small],
    }


def measure_case(case: Case, precision: str, repeats: int, budget: float, quick: bool) -> dict[str, Any]:
    """Check, time and, unless ``quick``, weigh the steps of one case."""
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
    """Time the plain step in bare torch and in the trainer's DeepSpeed engine (ZeRO 1, gradients clipped)."""
    from tracer.train.config import Config
    from tracer.train.engine import start_engine

    config = Config(
        Path(),
        batch_size=case.pairs,
        steps=LENGTH,
        warmup=1,
        precision=precision,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
    )
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


def frozen_steps(case: Case, precision: str, repeats: int, budget: float) -> dict[str, Timing]:
    """Time steps in bare torch where little trains, beside the plain step of full fine-tuning.

    R-Adapter and a locked image tower plain; both, and frozen lower halves of both towers, with TRACER's teacher.
    """
    model, image, text, _ = problem(case)
    models = {FULL: model} | {name: copy.deepcopy(model) for name in (ADAPTED, LOCKED, HALF)}
    add_adapters(models[ADAPTED])
    freeze(models[LOCKED], "image")
    halves = {
        which: len(chain.paths) // 2 for which in ("image", "text") if (chain := chain_of(model, which))
    }
    freeze(models[HALF], image_blocks=halves["image"], text_blocks=halves["text"])
    reference = _features(model, image, text)
    for name, each in models.items():  # adapters start at zero, so that all of them compute the same
        for mine, others in zip(_features(each, image, text), reference, strict=True):
            require_close(f"{case}, {name}: features", mine, others, 1e-4)
    calls = {
        name: plain_step(models[name].train(), image, text, precision) for name in (FULL, ADAPTED, LOCKED)
    }
    calls |= {
        f"{name}{TAUGHT}": tracer_step(models[name].train(), image, text, precision)
        for name in (ADAPTED, LOCKED, HALF)
    }
    return interleaved(calls, repeats=repeats, budget=budget)


def _features(model: nn.Module, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return encode(model.train(), image, text)[:2]


def plain_step(model: nn.Module, image: Tensor, text: Tensor, precision: str) -> Callable[[], None]:
    """Return a step of the contrastive loss alone over whatever trains."""
    optimizer = adamw(model, LR, WEIGHT_DECAY)

    def step() -> None:
        with mixed_precision(image.device, precision):
            loss = contrastive_loss(*encode(model, image, text)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def tracer_step(model: nn.Module, image: Tensor, text: Tensor, precision: str) -> Callable[[], None]:
    """Return a TRACER step over whatever trains, its teacher's forward pass included, as the trainer takes it."""
    optimizer, teacher, objective = (
        adamw(model, LR, WEIGHT_DECAY),
        build_teacher(model, WMA(LENGTH)),
        whole_objective(model),
    )
    prefix, steps = SharedPrefix(model, teacher.module), iter(range(1, LENGTH))

    def step() -> None:
        with mixed_precision(image.device, precision):
            with prefix:
                taught = encode(teacher.encode, image, text)
                student = encode(model, image, text)
            loss = objective(*student, taught, projections=projections(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.update(next(steps))

    return step


# ---------------------------------------------------------------------------------------------------
# Memory.


def memory(case: Case, trainer: Trainer) -> dict[str, Any]:
    """Return the bytes held during a step, and each step's peak beyond parameters, optimizer and teacher."""
    peaks = {
        kind: peak_memory("benchmarks.step", "step_call", case.model, case.pairs, trainer.precision, kind)
        for kind in (PLAIN, OURS, PUBLISHED)
    }
    return {"held": held(trainer), "peak": peaks}


def step_call(model: str, pairs: int, precision: str, kind: str) -> Callable[[], None]:
    """Return a step for :func:`benchmarks.measure.peak_memory`, after a first step has allocated what stays."""
    trainer = Trainer(problem(Case(model, pairs)), precision)
    phases = trainer.phases(kind)

    def call() -> None:
        for phase in phases.values():
            phase()

    call()
    return call


def held(trainer: Trainer) -> dict[str, int]:
    """Count the bytes that are held during a step, by purpose."""
    weights = sum(p.nbytes for p in trainer.model.parameters())
    state = [x for values in trainer.optimizer.state.values() for x in values.values()]
    return {
        "parameters": weights,
        "gradients": weights,
        "optimizer": sum(x.nbytes for x in state if isinstance(x, Tensor)),
        "teacher": sum(x.nbytes for x in trainer.teacher.gather().values()),
        "activations": kept_bytes(trainer.model, trainer.encode),
    }


if __name__ == "__main__":
    command_line(measure, report)
