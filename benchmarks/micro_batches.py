"""Cached gradients: a step in micro-batches, beside the step in one shot and open_clip's ``--accum-freq``.

    python -m benchmarks.micro_batches
    python -m benchmarks.micro_batches --cases '[ViT-B-32:64]' --count 8

All three train the same model on the same batch with the CLIP loss, in the trainer's DeepSpeed engine (ZeRO 1,
AdamW, gradients clipped), and see all pairs of the batch in the loss. TRACER encodes each micro-batch twice and
computes one loss. open_clip encodes each twice too, and computes the loss of the whole batch once for each
micro-batch. Times are medians of interleaved turns. Activations are counted: the bytes, weights apart, that the
student's forward pass keeps for its backward pass at a time. Before anything is timed, the gradients of the first
step must have the same norm; open_clip's may differ by a fifth, since its loop adds up the whole gradient of
logit_scale once for each micro-batch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from open_clip.loss import ClipLoss

from benchmarks.harness import Highlight, command_line, progress, table
from benchmarks.measure import Timing, interleaved, require_close
from benchmarks.step_trainer import LENGTH, LR, WEIGHT_DECAY, Case, kept_bytes, problem
from tracer.data.batches import Batch
from tracer.machine import resolve_precision
from tracer.models.clip import BiasedFeatures, Features
from tracer.ops import contrastive_loss
from tracer.train.cached import Cached, MicroBatch, OneShot, micro_batches
from tracer.train.config import Config
from tracer.train.engine import mixed_precision, start_engine

ONE_SHOT, CACHED, ACCUMULATED = "one shot", "micro-batches", "open_clip --accum-freq"
CASES, QUICK = ("tracer-demo:128", "tracer-demo:1024", "ViT-B-32:64"), ("tracer-demo:128",)
TARGET = 1.4  # times the step in one shot


def measure(
    *,
    quick: bool = False,
    cases: list[str] | None = None,
    count: int = 4,
    precision: str = "auto",
    repeats: int | None = None,
) -> dict[str, Any]:
    """Time the three steps of each case in turns.

    Args: quick: only the small model. cases: model:pairs; the model is any of open_clip, with random weights, or
    tracer-demo. count: the most micro-batches of a step. precision: fp32, amp_bf16, or auto, which chooses as the
    trainer does on this machine. repeats: turns of each step; default: 9, quick 3.
    """
    chosen = [Case.of(text) for text in cases or (QUICK if quick else CASES)]
    precision = resolve_precision(precision)
    measured = []
    for case in chosen:
        progress(f"micro_batches: {case}")
        measured.append(_measure_case(case, count, precision, repeats or (3 if quick else 9)))
    return {"cases": measured}


def _measure_case(case: Case, count: int, precision: Any, repeats: int) -> dict[str, Any]:
    posed = problem(case)
    numbers = torch.arange(case.pairs)
    batch = Batch(posed.image, posed.text, numbers, numbers)
    at_once = Config(
        Path(),
        batch_size=case.pairs,
        steps=LENGTH,
        warmup=1,
        precision=precision,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
    )
    divided = dataclasses.replace(at_once, micro_batch=-(-case.pairs // count))
    # As many as the engine expects, which may be fewer than asked for.
    whole, parts = (
        micro_batches(batch, config.micro_batches(), torch.float32, distinct=False)
        for config in (at_once, divided)
    )
    one, cached, accumulated = (
        start_engine(config, copy.deepcopy(posed.model)) for config in (at_once, divided, divided)
    )

    def in_one_shot() -> None:
        student = OneShot(one, whole[0], precision, False)
        student.backward(contrastive_loss(*student.features).loss)

    def in_micro_batches() -> None:
        student = Cached(cached, parts, precision, False)
        student.backward(contrastive_loss(*student.features).loss)

    calls: dict[str, Callable[[], None]] = {
        ONE_SHOT: in_one_shot,
        CACHED: in_micro_batches,
        ACCUMULATED: lambda: accumulate(accumulated, parts, precision),
    }
    for call in calls.values():
        call()
    norms = [torch.tensor(float(engine.get_global_grad_norm())) for engine in (one, cached, accumulated)]
    for name, norm, tolerance in zip(calls, norms, (0.0, 2e-2, 0.2), strict=True):
        require_close(f"{case}: norm of the gradient, {name}", norm, norms[0], tolerance)
    return {
        "model": case.model,
        "pairs": case.pairs,
        "precision": precision,
        "micro_batches": len(parts),
        "times": interleaved(calls, repeats=repeats),
        "activations": {
            name: kept_bytes(engine, partial(_encode, engine, part, precision))
            for name, engine, part in ((ONE_SHOT, one, whole[0]), (CACHED, cached, parts[0]))
        },
    }


def _encode(engine: Any, part: MicroBatch, precision: str) -> Features | BiasedFeatures:
    with mixed_precision(engine.device, precision):
        return part.encode(engine)


def accumulate(engine: Any, parts: Sequence[MicroBatch], precision: str) -> None:
    """Take a step as open_clip's training loop does with ``--accum-freq``: the whole loss for each micro-batch."""
    loss_of = ClipLoss()
    with torch.no_grad(), mixed_precision(engine.device, precision):
        known = [part.encode(engine) for part in parts]
    for place, part in enumerate(parts):
        with mixed_precision(engine.device, precision):
            mine = part.encode(engine)
            features = [*known[:place], mine, *known[place + 1 :]]
            image, text, _ = zip(*features, strict=True)
            loss = loss_of(torch.cat(image), torch.cat(text), mine.logit_scale)
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()


def _median(case: dict[str, Any], name: str) -> float:
    return case["times"][name]["median"]


def _title(case: dict[str, Any]) -> str:
    return f"{case['model']}, {case['pairs']} pairs in {case['micro_batches']} micro-batches, {case['precision']}"


def report(results: dict[str, Any]) -> str:
    """Return the table of the steps."""
    rows = []
    for case in results["cases"]:
        for name, time in case["times"].items():
            activations = case["activations"].get(name)
            rows.append([
                _title(case),
                name,
                str(Timing(**time)),
                f"{_median(case, name) / _median(case, ONE_SHOT):.2f}",
                "" if activations is None else f"{activations / 2**20:.1f} MiB",
            ])  # fmt: skip
    header = ["", "step", "time", "time / one shot", "activations (counted)"]
    return f"{table(header, rows)}\n\nTarget: at most {TARGET} times the step in one shot."


def highlights(results: dict[str, Any]) -> list[Highlight]:
    """Return a row for each case, beside open_clip's."""
    return [
        Highlight(
            f"cached gradients, {_title(case)}",
            str(Timing(**case["times"][CACHED])),
            f"{ACCUMULATED}: {Timing(**case['times'][ACCUMULATED])}",
            f"{_median(case, ACCUMULATED) / _median(case, CACHED):.2f}×",
        )
        for case in results["cases"]
    ]


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Return open_clip's time and that of one shot, divided by TRACER's in micro-batches."""
    return {
        f"{case['model']}, {case['pairs']} pairs: {name} / {CACHED}": _median(case, name)
        / _median(case, CACHED)
        for case in results["cases"]
        for name in (ONE_SHOT, ACCUMULATED)
    }


if __name__ == "__main__":
    command_line(measure, report)
