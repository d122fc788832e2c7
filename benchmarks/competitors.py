"""The implementations of the loss that the benchmarks compare, their inputs, and the check of their results.

A competitor gets a time or a memory count only after the check of its loss and of all its gradients.
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

from benchmarks import measure, packages, published
from benchmarks.packages import INF_CL, INSTALL, MEMEFF, SIGLIP_KERNEL
from tracer.losses import TracerLoss
from tracer.ops import contrastive_loss

WEIGHTS = TracerLoss().distill_weights  # as published for ViT-B/16
MARGIN, SMOOTHING, CLASSES = 0.05, 0.05, 100  # MPM-NCE
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES = {
    "full": "whole objective",
    "mpm-nce": "MPM-NCE, 100 classes",
    "mpm-nce-2": "MPM-NCE, 2 classes",  # half of all logits are positives, the worst case for lists of them
    "clip": "CLIP loss",
    "siglip": "SigLIP loss",
    "lit": "LiT loss, each text among locked images",
}
# Matrix products of 2·N²·D operations that the algorithm needs, forward and backward (see benchmarks/work.py).
UNITS = {
    "full": (4, 8),
    "mpm-nce": (1, 3),
    "mpm-nce-2": (1, 3),
    "clip": (1, 3),
    "siglip": (3, 0),
    "lit": (1, 2),
}

# What impl="auto" takes; on a CPU it takes the definition for small batches.
OURS = f"ours ({'triton' if DEVICE == 'cuda' else 'blocked'})"
EAGER = "ours (eager)"
PUBLISHED, OPEN_CLIP = "published", "open_clip"
SIGLIP, SIGLIP_DEFINED = "SigLIP (open_clip), another loss", "SigLIP, as defined"
IN_CHUNKS = "torch, 512 texts at a time"
COMPILED = ", compiled"
PACKAGES = tuple(INSTALL)  # their kernels need an NVIDIA GPU

# Largest relative error of loss and gradients. The 16-bit precisions round features and products.
TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 3e-2, "fp16": 5e-3}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DISTINCT = 4096  # pairs that differ; larger batches repeat them, so that their results follow from one copy


def baseline(case: str) -> str:
    """Return what a case is compared with: the implementation that people use today."""
    return OPEN_CLIP if case in ("clip", "siglip") else PUBLISHED


def results_of(case: str) -> list[str]:
    """Return what a step of a case has for a result, in the order of :meth:`Step.result`."""
    image, bias = case != "lit", case == "siglip"
    return ["loss", *["image gradient"] * image, "text gradient", "scale gradient", *["bias gradient"] * bias]


def repeats(case: str) -> bool:
    """Return whether the loss of a batch that holds each pair several times follows from that of one copy."""
    return case in ("full", "clip")


class Size(NamedTuple):
    """The case, precision, number of pairs N and width D of a row of the tables."""

    case: str
    precision: str
    pairs: int
    width: int

    @property
    def work(self) -> float:
        """Multiply-adds that the algorithm needs, forward and backward."""
        return float(sum(UNITS[self.case])) * self.pairs**2 * self.width

    def __str__(self) -> str:
        return f"{self.case}, {self.precision}, N {self.pairs}, D {self.width}"


def size_of(row: dict[str, Any]) -> Size:
    """Return the size of a row of results."""
    return Size(*(row[field] for field in Size._fields))


# ---------------------------------------------------------------------------------------------------
# Inputs and implementations.


class Problem:
    """Features of a partly trained student and of its teacher: cosine 0.2 within a pair, loss about 1.

    Batches of more than ``DISTINCT`` pairs contain each pair ``copies`` times.
    """

    def __init__(self, pairs: int, width: int, device: str = DEVICE) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pairs, self.width = pairs, width
        distinct = min(pairs, DISTINCT)
        self.copies = pairs // distinct
        if self.copies * distinct != pairs:
            raise SystemExit(f"{pairs} pairs: a number above {DISTINCT} must be a multiple of {DISTINCT}")

        def noise() -> Tensor:
            return F.normalize(torch.randn(distinct, width, generator=generator), dim=1)

        concept = noise()

        def features() -> Tensor:
            return F.normalize(0.5 * concept + noise(), dim=1).to(device).repeat(self.copies, 1)

        self.student = [features().requires_grad_() for _ in range(2)]
        self.student.append(torch.tensor(50.0, device=device, requires_grad=True))
        self.teacher = [features() for _ in range(2)] + [torch.tensor(60.0, device=device)]
        self.bias = torch.tensor(-10.0, device=device, requires_grad=True)  # as SigLIP's begins
        self.labels = torch.randint(CLASSES, (distinct,), generator=generator).to(device).repeat(self.copies)

    def options(self, case: str) -> dict[str, Any]:
        """Return the keyword arguments with which a case calls :func:`tracer.ops.contrastive_loss`."""
        if case == "full":
            image, text, scale = self.teacher
            return {"teacher_image": image, "teacher_text": text, "teacher_logit_scale": scale, **WEIGHTS}
        if case == "clip":
            return {}
        if case == "siglip":
            return {"contrast": "sigmoid", "logit_bias": self.bias}
        if case == "lit":
            return {"directions": (0.0, 1.0)}
        return {"labels": self.labels_of(case), "margin": MARGIN, "smoothing": SMOOTHING}

    def labels_of(self, case: str) -> Tensor:
        """Return the labels, int64 [N], of an MPM-NCE case."""
        return self.labels % 2 if case == "mpm-nce-2" else self.labels

    def loss(self, case: str, competitor: str) -> Callable[[], Tensor]:
        """Return a call that computes a competitor's loss of the student's features."""
        if case == "siglip" and not competitor.endswith(COMPILED) and not competitor.startswith("ours"):
            return partial(self._siglip(competitor), *self.inputs(case))
        image, text, scale = self.student
        if case == "lit":
            image = image.detach()
        if competitor.endswith(COMPILED):
            torch.compiler.reset()  # otherwise torch stops compiling after a few sizes of the same function
            return torch.compile(
                self.loss(case, competitor.removesuffix(COMPILED)), dynamic=False, fullgraph=True
            )
        if competitor.startswith("ours"):
            impl, options = competitor[len("ours (") : -1], self.options(case)
            return lambda: contrastive_loss(image, text, scale, impl=impl, **options).loss
        if competitor == OPEN_CLIP:
            return partial(open_clip.loss.ClipLoss(), image, text, scale)
        if competitor == SIGLIP:
            return partial(open_clip.loss.SigLipLoss(), image, text, scale, None)
        if competitor == SIGLIP_DEFINED:
            return partial(published.siglip_loss, image, text, scale)
        if competitor == INF_CL:
            return partial(packages.inf_cl_loss, image, text, scale)
        if competitor == MEMEFF:
            loss = packages.memeff_lit_loss if case == "lit" else packages.memeff_loss
            return partial(loss, image, text, 1 / scale.item())
        if competitor == SIGLIP_KERNEL:
            return partial(packages.siglip_kernel_loss, image, text, scale)
        if case == "lit":
            return partial(published.lit_loss, image, text, scale)
        if case == "full":
            inputs = (image, text, scale, *self.teacher)
            return partial(published.tracer_loss, *inputs, **WEIGHTS)  # type: ignore[arg-type]
        return partial(published.mpm_nce_loss, image, text, scale, self.labels_of(case), MARGIN, SMOOTHING)

    def _siglip(self, competitor: str) -> Callable[..., Tensor]:
        """Return a competitor's SigLIP loss as a function of features, scale and bias."""
        losses = {
            OPEN_CLIP: open_clip.loss.SigLipLoss(),
            IN_CHUNKS: published.siglip_loss_in_chunks,
            SIGLIP_KERNEL: packages.siglip_kernel_loss,
        }
        return losses[competitor]

    def inputs(self, case: str) -> list[Tensor]:
        """Return the tensors whose gradients a case takes; images are locked in LiT's."""
        if case == "lit":
            return self.student[1:]
        return [*self.student, self.bias] if case == "siglip" else self.student

    def step(self, case: str, competitor: str, precision: str) -> Step:
        """Return a competitor's step, ready to be called."""
        return Step(self.loss(case, competitor), self.inputs(case), precision)


class Step:
    """A loss and the gradients of its inputs, in two phases that are timed separately."""

    def __init__(self, loss: Callable[[], Tensor], inputs: Sequence[Tensor], precision: str) -> None:
        self.loss, self.inputs, self.precision = loss, inputs, precision
        self.phases = {"forward": self.forward, "backward": self.backward}
        # The scale that a gradient scaler would reach: without it, gradients of about 1/N² leave float16's range.
        scale = 4.0 * len(inputs[0]) if precision == "fp16" else 1.0
        self.seed = torch.tensor(scale, device=inputs[0].device)

    def forward(self) -> None:
        """Compute the loss."""
        dtype, kind = HALF.get(self.precision), self.inputs[0].device.type
        with float32_products(self.precision), torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            self.value = self.loss()

    def backward(self) -> None:
        """Compute the gradients."""
        with float32_products(self.precision):
            self.grads = torch.autograd.grad(self.value, self.inputs, self.seed, allow_unused=True)

    def __call__(self) -> None:
        self.forward()
        self.backward()

    def result(self) -> list[Tensor]:
        """Return the last call's loss and the gradients of its inputs, empty where it has none."""
        grads = (torch.empty(0) if grad is None else grad / self.seed for grad in self.grads)
        return [self.value.detach(), *grads]


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Multiply float32 operands in TF32 within the block if that is the precision, exactly otherwise."""
    matmul = torch.backends.cuda.matmul
    kept = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = kept


def precisions_here() -> tuple[str, ...]:
    """Return the precisions in which both this machine and TRACER's loss multiply."""
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
# The check of results.


@lru_cache(maxsize=4)
def _reference(case: str, competitor: str, pairs: int, width: int) -> list[Tensor]:
    step = Problem(pairs, width).step(case, competitor, "fp32")
    step()
    return [x.cpu() for x in step.result()]


def expected(case: str, pairs: int, width: int) -> list[Tensor]:
    """Return loss and gradients, computed by the case's baseline in float32.

    Where a batch contains each pair k times, they follow from one copy: every softmax spreads over k times as
    many logits, so a cross-entropy with one positive grows by log k, a divergence stays the same, and each copy
    gets a k-th of the gradient.
    """
    distinct = min(pairs, DISTINCT)
    copies = pairs // distinct
    right = _reference(case, baseline(case), distinct, width)
    if copies == 1:
        return right
    if not repeats(case):
        raise SystemExit(f"{CASES[case]} can be checked up to {DISTINCT} pairs only: choose fewer pairs")
    loss, image, text, scale = right
    entropies = 1 + (WEIGHTS["interactive"] if case == "full" else 0)
    grads = (x.repeat(copies, 1) / copies for x in (image, text))
    return [loss + entropies * math.log(copies), *grads, scale]


def check(
    case: str, competitor: str, precision: str, result: Sequence[Tensor], pairs: int, width: int
) -> None:
    """Check a competitor's loss and gradients, as :meth:`Step.result` returns them.

    memeff alone may leave out the gradient of the scale, which it does not have.

    Raises:
        WrongResult: one of them is wrong; ends the benchmark.
    """
    # Other packages multiply float32 in TF32. SigLIP is another loss with a definition of its own.
    as_precise = "tf32" if competitor in PACKAGES and precision == "fp32" else precision
    if case == "clip" and competitor in (SIGLIP, SIGLIP_KERNEL):
        right = _reference(case, SIGLIP_DEFINED, pairs, width)
    else:
        right = expected(case, pairs, width)
    for what, got, wanted in zip(results_of(case), result, right, strict=True):
        name = f"{CASES[case]}, {precision}, N {pairs}, D {width}: {what} of {competitor}"
        if not got.numel():
            if (competitor, what) != (MEMEFF, "scale gradient"):
                raise measure.WrongResult(f"{name} is missing")
            continue
        measure.require_close(name, got.cpu(), wanted, TOLERANCE[as_precise])


# ---------------------------------------------------------------------------------------------------
# Which competitors can run here.


@lru_cache(maxsize=64)
def _need_at_1024(case: str, competitor: str, precision: str, width: int) -> int:
    step = Problem(1024, width).step(case, competitor, precision)
    step()
    return measure.peak_here(step) if DEVICE == "cuda" else measure.allocated(step)


def lacks_memory(case: str, competitor: str, precision: str, pairs: int, width: int) -> str | None:
    """Say why a competitor that stores N×N matrices does not fit; its need, measured at N 1024, grows by N²."""
    free = measure.available_memory()
    if competitor in (OURS, "ours (blocked)", IN_CHUNKS, *PACKAGES):
        return None
    if 256 * pairs**2 < free:  # room for 64 float32 matrices is enough for every competitor
        return None
    need = _need_at_1024(case, competitor.removesuffix(COMPILED), precision, width) * (pairs / 1024) ** 2
    if need < 0.9 * free:
        return None
    return f"does not fit: about {need / 2**30:.0f} GiB of N×N matrices, {free / 2**30:.0f} GiB free"


def lacks_package(competitor: str) -> str | None:
    """Say what a competitor needs that this machine does not have."""
    if competitor not in PACKAGES:
        return None
    module, install = INSTALL[competitor]
    if DEVICE == "cpu":
        return "needs an NVIDIA GPU"
    if importlib.util.find_spec(module) is None:
        return f"not installed: {install}"
    return None


def competitors_of(case: str) -> list[str]:
    """Return the names of all competitors of a case, TRACER's implementations first."""
    ours = [OURS, "ours (blocked)"] if DEVICE == "cuda" else [OURS]
    others = {"clip": [*PACKAGES, SIGLIP], "siglip": [IN_CHUNKS, SIGLIP_KERNEL], "lit": [MEMEFF]}
    return [*ours, EAGER, baseline(case), baseline(case) + COMPILED, *others.get(case, [])]
