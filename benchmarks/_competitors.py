"""Who computes a loss in the benchmarks, of what, and whether the result is right.

A competitor gets a time or a memory count only after its loss and all gradients were found right.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import open_clip.loss
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import _measure, published
from tracer.ops import contrastive_loss

WEIGHTS = {"relational": 0.9, "interactive": 0.9, "cross": 0.9, "feature": 1800.0}  # published, ViT-B/16
MARGIN, SMOOTHING, CLASSES = 0.05, 0.05, 100  # MPM-NCE
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES = {
    "full": "whole objective",
    "mpm-nce": "MPM-NCE, 100 classes",
    "mpm-nce-2": "MPM-NCE, 2 classes",  # half of all pairs positive: the worst case of lists of positives
    "clip": "CLIP loss",
}
# Matrix products of 2·N²·D operations that the algorithm needs, forward and backward (see benchmarks/work.py).
UNITS = {"full": (4, 8), "mpm-nce": (1, 3), "mpm-nce-2": (1, 3), "clip": (1, 3)}

OURS = f"ours ({'triton' if DEVICE == 'cuda' else 'blocked'})"  # what impl="auto" takes at these sizes
EAGER = "ours (eager)"
PUBLISHED, OPEN_CLIP, INF_CL = "published", "open_clip", "Inf-CL"
SIGLIP, SIGLIP_DEFINED = "SigLIP (open_clip), another loss", "SigLIP, as defined"
COMPILED = ", compiled"

# Largest relative error of loss and gradients. Half-width precisions round features and products.
TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 3e-2, "fp16": 5e-3}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DISTINCT = 4096  # pairs that differ; larger batches repeat them, so that their results follow from these


def theirs(case: str) -> str:
    """What a case is compared with: what people use today."""
    return OPEN_CLIP if case == "clip" else PUBLISHED


class Size(NamedTuple):
    """What a row of the tables is about."""

    case: str
    precision: str
    pairs: int
    width: int

    @property
    def work(self) -> float:
        return float(sum(UNITS[self.case])) * self.pairs**2 * self.width

    def __str__(self) -> str:
        return f"{self.case}, {self.precision}, N {self.pairs}, D {self.width}"


def size_of(row: dict[str, Any]) -> Size:
    return Size(*(row[field] for field in Size._fields))


# ---------------------------------------------------------------------------------------------------
# What is computed.


class Problem:
    """Features of a student that has learnt something and of its teacher: cosine 0.2 in a pair, loss about 1.

    Of more than ``DISTINCT`` pairs each is there ``copies`` times.
    """

    def __init__(self, pairs: int, width: int, device: str = DEVICE) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pairs, self.width = pairs, width
        distinct = min(pairs, DISTINCT)
        self.copies = pairs // distinct
        if self.copies * distinct != pairs:
            raise SystemExit(f"{pairs} pairs: more than {DISTINCT} must be a multiple of {DISTINCT}")

        def noise() -> Tensor:
            return F.normalize(torch.randn(distinct, width, generator=generator), dim=1)

        concept = noise()

        def features() -> Tensor:
            return F.normalize(0.5 * concept + noise(), dim=1).to(device).repeat(self.copies, 1)

        self.student = [features().requires_grad_() for _ in range(2)]
        self.student.append(torch.tensor(50.0, device=device, requires_grad=True))
        self.teacher = [features() for _ in range(2)] + [torch.tensor(60.0, device=device)]
        self.labels = torch.randint(CLASSES, (distinct,), generator=generator).to(device).repeat(self.copies)

    def options(self, case: str) -> dict[str, Any]:
        """What a case adds to the call of our loss."""
        if case == "full":
            image, text, scale = self.teacher
            return {"teacher_image": image, "teacher_text": text, "teacher_logit_scale": scale, **WEIGHTS}
        if case == "clip":
            return {}
        return {"labels": self.labels_of(case), "margin": MARGIN, "smoothing": SMOOTHING}

    def labels_of(self, case: str) -> Tensor:
        return self.labels % 2 if case == "mpm-nce-2" else self.labels

    def loss(self, case: str, who: str) -> Callable[[], Tensor]:
        """One competitor's loss of the student's features."""
        image, text, scale = self.student
        if who.endswith(COMPILED):
            torch.compiler.reset()  # one code for several sizes: beyond a few it would run uncompiled
            return torch.compile(self.loss(case, who.removesuffix(COMPILED)), dynamic=False, fullgraph=True)
        if who.startswith("ours"):
            impl, options = who[len("ours (") : -1], self.options(case)
            return lambda: contrastive_loss(image, text, scale, impl=impl, **options).loss
        if who == OPEN_CLIP:
            return partial(open_clip.loss.ClipLoss(), image, text, scale)
        if who == SIGLIP:
            return partial(open_clip.loss.SigLipLoss(), image, text, scale, None)
        if who == SIGLIP_DEFINED:
            return partial(published.siglip_loss, image, text, scale)
        if who == INF_CL:
            return partial(published.inf_cl_loss, image, text, scale)
        if case == "full":
            inputs = (image, text, scale, *self.teacher)
            return partial(published.tracer_loss, *inputs, **WEIGHTS)  # type: ignore[arg-type]
        return partial(published.mpm_nce_loss, image, text, scale, self.labels_of(case), MARGIN, SMOOTHING)

    def step(self, case: str, who: str, precision: str) -> Step:
        return Step(self.loss(case, who), self.student, precision)


class Step:
    """A loss and the gradients of features and scale, in two phases that are timed apart."""

    def __init__(self, loss: Callable[[], Tensor], inputs: Sequence[Tensor], precision: str) -> None:
        self.loss, self.inputs, self.precision = loss, inputs, precision
        self.phases = {"forward": self.forward, "backward": self.backward}
        # What a gradient scaler would find: without it gradients of about 1/N² leave float16's range.
        scale = 4.0 * len(inputs[0]) if precision == "fp16" else 1.0
        self.seed = torch.tensor(scale, device=inputs[0].device)

    def forward(self) -> None:
        dtype, kind = HALF.get(self.precision), self.inputs[0].device.type
        with float32_products(self.precision), torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            self.value = self.loss()

    def backward(self) -> None:
        with float32_products(self.precision):
            self.grads = torch.autograd.grad(self.value, self.inputs, self.seed)

    def __call__(self) -> None:
        self.forward()
        self.backward()

    def result(self) -> list[Tensor]:
        """Loss and gradients of image, text and scale, of the last call."""
        return [self.value.detach(), *(grad / self.seed for grad in self.grads)]


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """TF32 for float32 operands where that is the precision, exact products else."""
    matmul = torch.backends.cuda.matmul
    kept = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = kept


def precisions_here() -> tuple[str, ...]:
    """The precisions that this machine multiplies in, and our loss with it."""
    if DEVICE == "cpu":
        return ("fp32", "bf16")
    from tracer.kernels._tiles import precision

    with float32_products("tf32"):
        has_tf32 = precision(torch.empty(1, device=DEVICE)) == "tf32"
    return ("fp32", "tf32", "bf16", "fp16") if has_tf32 else ("fp32", "bf16", "fp16")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------
# Right or not.


@lru_cache(maxsize=4)
def _reference(case: str, who: str, pairs: int, width: int) -> list[Tensor]:
    step = Problem(pairs, width).step(case, who, "fp32")
    step()
    return [x.cpu() for x in step.result()]


def expected(case: str, pairs: int, width: int) -> list[Tensor]:
    """Loss and gradients by the published formulation in float32.

    Where each pair is there k times, they follow from one copy. Every softmax then spreads over k times as
    many places: a cross-entropy with one positive grows by log k, a divergence stays, and each copy's gradient
    is a k-th.
    """
    distinct = min(pairs, DISTINCT)
    copies = pairs // distinct
    loss, image, text, scale = _reference(case, theirs(case), distinct, width)
    if copies == 1:
        return [loss, image, text, scale]
    if case.startswith("mpm-nce"):
        raise SystemExit(f"MPM-NCE is checked up to {DISTINCT} pairs only")
    entropies = 1 + (WEIGHTS["interactive"] if case == "full" else 0)
    grads = (x.repeat(copies, 1) / copies for x in (image, text))
    return [loss + entropies * math.log(copies), *grads, scale]


def check(case: str, who: str, precision: str, found: Sequence[Tensor], pairs: int, width: int) -> None:
    """Stop the benchmark if a competitor's loss or one of its gradients is wrong."""
    # Inf-CL always multiplies in TF32; SigLIP is another loss, and has a definition of its own.
    as_precise = "tf32" if who == INF_CL and precision == "fp32" else precision
    if who == SIGLIP:
        right = _reference(case, SIGLIP_DEFINED, pairs, width)
    else:
        right = expected(case, pairs, width)
    names = ("loss", "image gradient", "text gradient", "scale gradient")
    for what, got, wanted in zip(names, found, right, strict=True):
        name = f"{CASES[case]}, {precision}, N {pairs}, D {width}: {what} of {who}"
        _measure.require_close(name, got.cpu(), wanted, TOLERANCE[as_precise])


# ---------------------------------------------------------------------------------------------------
# Who can take part.


@lru_cache(maxsize=64)
def _need_at_1024(case: str, who: str, precision: str, width: int) -> int:
    step = Problem(1024, width).step(case, who, precision)
    step()
    return _measure.peak_here(step) if DEVICE == "cuda" else _measure.allocated(step)


def lacks_memory(case: str, who: str, precision: str, pairs: int, width: int) -> str | None:
    """Why a competitor that stores N×N matrices can't run; its need is measured at N 1024 and grows by N²."""
    free = _measure.available_memory()
    if who in (OURS, "ours (blocked)", INF_CL) or 256 * pairs**2 < free:  # 64 matrices: nobody has so many
        return None
    need = _need_at_1024(case, who.removesuffix(COMPILED), precision, width) * (pairs / 1024) ** 2
    if need < 0.9 * free:
        return None
    return f"does not fit: about {need / 2**30:.0f} GiB of N×N matrices, {free / 2**30:.0f} GiB free"


def lacks_package(who: str) -> str | None:
    if who == INF_CL and DEVICE == "cpu":
        return "needs an NVIDIA GPU"
    if who == INF_CL and importlib.util.find_spec("inf_cl") is None:
        return "not installed: pip install --no-deps inf-cl"
    return None


def everyone(case: str) -> list[str]:
    """All competitors of a case, ours first."""
    ours = [OURS, "ours (blocked)"] if DEVICE == "cuda" else [OURS]
    others = [INF_CL, SIGLIP] if case == "clip" else []
    return [*ours, EAGER, theirs(case), theirs(case) + COMPILED, *others]
