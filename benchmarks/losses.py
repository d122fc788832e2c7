"""The loss, forward and backward: ours against the published formulation and open_clip's.

    python -m benchmarks.losses                     tables for people
    python -m benchmarks.losses --json out.json     the same for machines
    python -m benchmarks.losses --pairs 1024 --repeats 3 --no-growth      quick

All times are of one process with the competitors taking turns, medians with the 20th and 80th
percentile; memory is the peak beyond the inputs, in a fresh process. Nothing is printed unless loss and
gradients agree first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip.loss
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import _measure, published
from tracer.ops import contrastive_loss

WEIGHTS = {"relational": 0.9, "interactive": 0.9, "cross": 0.9, "feature": 1800.0}  # published, ViT-B/16
MARGIN, SMOOTHING, CLASSES = 0.05, 0.05, 100  # MPM-NCE
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Largest relative error of loss and gradients against the other's result. Both round their products to
# 8 bits in bfloat16.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


class Problem:
    """Features of a student that has learnt something and of its teacher: cosine 0.2 in a pair, loss about 1."""

    def __init__(self, pairs: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def noise() -> Tensor:
            return F.normalize(torch.randn(pairs, width, generator=generator), dim=1).to(DEVICE)

        concept = noise()
        self.student = [F.normalize(0.5 * concept + noise(), dim=1).requires_grad_() for _ in range(2)]
        self.student.append(torch.tensor(50.0, device=DEVICE, requires_grad=True))
        self.teacher = [F.normalize(0.5 * concept + noise(), dim=1) for _ in range(2)]
        self.teacher.append(torch.tensor(60.0, device=DEVICE))
        self.labels = torch.randint(CLASSES, (pairs,), generator=generator).to(DEVICE)

    def ours(self, **options: Any) -> Callable[[], Tensor]:
        return lambda: contrastive_loss(*self.student, **options).loss

    def with_teacher(self) -> dict[str, Any]:
        image, text, scale = self.teacher
        return {"teacher_image": image, "teacher_text": text, "teacher_logit_scale": scale, **WEIGHTS}

    def published_tracer(self) -> Tensor:
        image, text, scale = self.student
        return published.tracer_loss(image, text, scale, *self.teacher, **WEIGHTS)  # type: ignore[arg-type]

    def mpm_nce(self, labels: Tensor) -> dict[str, Callable[[], Tensor]]:
        image, text, scale = self.student
        return {
            "ours": self.ours(labels=labels, margin=MARGIN, smoothing=SMOOTHING),
            "published": partial(published.mpm_nce_loss, image, text, scale, labels, MARGIN, SMOOTHING),
        }

    def competitors(self, case: str) -> dict[str, Callable[[], Tensor]]:
        """Losses that must agree; the first is ours, the last the one to compare with."""
        if case == "full":
            return {
                "ours": self.ours(**self.with_teacher()),
                "published": self.published_tracer,
            }
        if case == "mpm-nce":
            return self.mpm_nce(self.labels)
        if case == "mpm-nce-2":
            return self.mpm_nce(self.labels % 2)
        return {"ours": self.ours(), "open_clip": partial(open_clip.loss.ClipLoss(), *self.student)}

    def step(self, loss: Callable[[], Tensor], precision: str) -> list[Tensor]:
        """Loss and gradients of features and scale."""
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        return [value.detach(), *torch.autograd.grad(value, self.student)]


CASES = {
    "full": "whole objective",
    "mpm-nce": "MPM-NCE, 100 classes",
    "mpm-nce-2": "MPM-NCE, 2 classes",  # half of all pairs positive: the worst case of lists of positives
    "clip": "CLIP loss",
}
PRECISIONS = ("fp32", "bf16")


def memory_call(case: str, who: str, precision: str, pairs: int, width: int) -> Callable[[], Any]:
    """For :func:`benchmarks._measure.peak_memory`: one step, after a small one has loaded the libraries."""
    small = Problem(64, width)
    small.step(small.competitors(case)[who], precision)
    problem = Problem(pairs, width)
    return lambda: problem.step(problem.competitors(case)[who], precision)


def check(problem: Problem, case: str, precision: str) -> None:
    (ours, loss), (other, reference) = problem.competitors(case).items()
    for what, got, expected in zip(
        ("loss", "image gradient", "text gradient", "scale gradient"),
        problem.step(loss, precision),
        problem.step(reference, precision),
        strict=True,
    ):
        _measure.require_close(
            f"{case} {precision}: {what} of {ours} vs {other}", got, expected, TOLERANCE[precision]
        )


def compare(
    cases: Iterable[str], pairs: int, width: int, repeats: int, budget: float
) -> list[dict[str, Any]]:
    """Times and memory of the cases in both precisions at one size."""
    results = []
    problem = Problem(pairs, width)
    for case in cases:
        for precision in PRECISIONS:
            check(problem, case, precision)
            losses = problem.competitors(case)
            times = _measure.interleaved(
                {who: partial(problem.step, loss, precision) for who, loss in losses.items()},
                repeats=repeats,
                budget=budget,
            )
            memory = {
                who: _measure.peak_memory(
                    "benchmarks.losses", "memory_call", case, who, precision, pairs, width
                )
                for who in losses
            }
            (_, other) = losses
            results.append(
                {
                    "case": case,
                    "precision": precision,
                    "pairs": pairs,
                    "width": width,
                    "against": other,
                    "time": times,
                    "memory": memory,
                    "speedup": times[other].median / times["ours"].median,
                    "memory_ratio": memory["ours"] / memory[other],
                }
            )
    return results


def growth(width: int, largest: int) -> list[dict[str, Any]]:
    """Extra memory of the whole objective as the batch doubles."""
    sizes = [largest // 8, largest // 4, largest // 2, largest]
    return [
        {
            "pairs": pairs,
            "memory": {
                who: _measure.peak_memory(
                    "benchmarks.losses", "memory_call", "full", who, "fp32", pairs, width
                )
                for who in ("ours", "published")
            },
        }
        for pairs in sizes
    ]


def report(results: list[dict[str, Any]], grown: list[dict[str, Any]]) -> str:
    mebibytes = lambda n: f"{n / 2**20:.0f} MiB"  # noqa: E731
    rows = [
        [
            CASES[r["case"]],
            r["precision"],
            str(r["pairs"]),
            str(r["time"]["ours"]),
            f"{r['time'][r['against']]} {r['against']}",
            f"{r['speedup']:.2f}×",
            f"{mebibytes(r['memory']['ours'])} / {mebibytes(r['memory'][r['against']])}",
            f"1/{1 / r['memory_ratio']:.0f}",
        ]
        for r in results
    ]
    header = ["loss", "dtype", "pairs", "ours", "theirs", "faster", "extra memory", "ratio"]
    text = "Forward and backward, median (20th–80th percentile)\n\n" + _measure.table(header, rows)
    if grown:
        rows = [
            [str(r["pairs"]), *(mebibytes(r["memory"][who]) for who in ("ours", "published"))] for r in grown
        ]
        text += "\n\nExtra memory of the whole objective, fp32\n\n" + _measure.table(
            ["pairs", "ours", "published"], rows
        )
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=[4096], help="batch sizes N")
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--width", type=int, default=512, help="feature width D")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for the repeats of one case")
    parser.add_argument("--no-growth", action="store_true", help="leave out the memory as N doubles")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args(argv)

    environment = _measure.environment()
    print(", ".join(f"{name} {value}" for name, value in environment.items()), flush=True)
    results = [
        r for pairs in args.pairs for r in compare(args.cases, pairs, args.width, args.repeats, args.budget)
    ]
    grown = [] if args.no_growth else growth(args.width, max(args.pairs))
    print(report(results, grown))
    if args.json:
        document = {"environment": environment, "results": results, "growth": grown}
        args.json.write_text(json.dumps(document, default=_measure.plain, indent=1) + "\n")


if __name__ == "__main__":
    main()
