"""The loss, forward and backward: ours beside the published formulation, open_clip's and Inf-CL's.

    python -m benchmarks.losses                     tables for people
    python -m benchmarks.losses --json              the same for machines
    python -m benchmarks.losses --quick             a look, in half a minute
    python -m benchmarks.losses --cases "[full, clip]" --precisions "[bf16]" --pairs 8192

Competitors take turns in one process: medians with the 20th and 80th percentile, forward (with what backward
needs) and backward apart. A competitor gets a time only after its loss and all gradients were found right.
Memory is the peak beyond the inputs, each in a fresh process. Whatever does not fit into memory or into the
budget of time is named, with the reason. On a GPU times are the device's, from cold caches; small batches are
timed a second time as replayed graphs; ``nsys profile python -m benchmarks.losses`` shows each call by name.
"""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple
from unittest.mock import patch

import open_clip.loss
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import _gpu, _measure, _plots, published
from benchmarks._measure import TOTAL, Timing, table
from benchmarks._part import Highlight, command_line, progress
from tracer.kernels import blocked
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
SIGLIP = "SigLIP (open_clip), another loss"
COMPILED = ", compiled"

# Largest relative error of loss and gradients. Half-width precisions round features and products.
TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 3e-2, "fp16": 5e-3}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DISTINCT = 4096  # pairs that differ; larger batches repeat them, so that their results follow from these
SWEEP = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
WIDTHS = (512, 768, 1280)
COPY_BYTES, MATRIX_SIDE = 1 << 30, 2048  # of the measured rates; a GPU has a side of its own
SMALL = 5e-3  # seconds on a GPU below which a step is also timed as replayed graphs


def theirs(case: str) -> str:
    """What a case is compared with: what people use today."""
    return OPEN_CLIP if case == "clip" else PUBLISHED


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
    from tracer.kernels import _config

    with float32_products("tf32"):
        has_tf32 = _config.precision(torch.empty(1, device=DEVICE)) == "tf32"
    return ("fp32", "tf32", "bf16", "fp16") if has_tf32 else ("fp32", "bf16", "fp16")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------
# Right or not.


@lru_cache(maxsize=4)
def _reference(case: str, pairs: int, width: int) -> list[Tensor]:
    step = Problem(pairs, width).step(case, theirs(case), "fp32")
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
    loss, image, text, scale = _reference(case, distinct, width)
    if copies == 1:
        return [loss, image, text, scale]
    if case.startswith("mpm-nce"):
        raise SystemExit(f"MPM-NCE is checked up to {DISTINCT} pairs only")
    entropies = 1 + (WEIGHTS["interactive"] if case == "full" else 0)
    grads = (x.repeat(copies, 1) / copies for x in (image, text))
    return [loss + entropies * math.log(copies), *grads, scale]


def check(case: str, who: str, precision: str, found: Sequence[Tensor], pairs: int, width: int) -> None:
    """Stop the benchmark if a competitor's loss or one of its gradients is wrong."""
    if who == SIGLIP:  # sigmoid for each pair instead of a softmax: nothing of ours to compare it with
        return
    as_precise = (
        "tf32" if who == INF_CL and precision == "fp32" else precision
    )  # it always multiplies in TF32
    for what, got, right in zip(
        ("loss", "image gradient", "text gradient", "scale gradient"),
        found,
        expected(case, pairs, width),
        strict=True,
    ):
        name = f"{CASES[case]}, {precision}, N {pairs}, D {width}: {what} of {who}"
        _measure.require_close(name, got.cpu(), right, TOLERANCE[as_precise])


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


# ---------------------------------------------------------------------------------------------------
# Measuring.


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


class Bench:
    """Rows, taken one after the other until a deadline; what earlier ones took predicts what the next will."""

    def __init__(self, budget: float, repeats: int, patience: float) -> None:
        self.deadline = time.monotonic() + budget
        self.repeats, self.patience = repeats, patience
        self.pace: dict[tuple[str, str, str], float] = {}  # seconds per unit of work of the last row

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def predicted(self, size: Size, who: str) -> float:
        """Seconds of one step; 0 as long as nothing is known."""
        return self.pace.get((size.case, size.precision, who), 0.0) * size.work

    def needed(self, size: Size, who: str) -> float:
        """Seconds of a row: a check and three turns."""
        return 4 * self.predicted(size, who)

    def row(self, size: Size, who: Sequence[str], seconds: float, main: bool = False) -> dict[str, Any]:
        """Check and time competitors; those that can't take part get a note that says why."""
        problem = Problem(size.pairs, size.width)
        found: dict[str, dict[str, Any]] = {name: {} for name in who}
        steps: dict[str, Step] = {}
        spare = self.left() - self.needed(size, OURS)
        for name in who:
            if name != OURS:
                spare -= self.needed(size, name)
            if why := self.why_not(size, name, spare):
                found[name]["note"] = why
                spare += self.needed(size, name)
                continue
            try:
                steps[name], found[name]["first"] = self.begin(size, name, problem)
            except torch.OutOfMemoryError:
                found[name]["note"] = "does not fit into the GPU's memory"
            except Exception as error:
                if not name.endswith(COMPILED) and name != INF_CL:
                    raise
                found[name]["note"] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        times = _measure.interleaved_phases(
            {name: step.phases for name, step in steps.items()},
            repeats=self.repeats,
            warmup=1 if DEVICE == "cuda" else 0,  # the check was one
            budget=min(seconds, max(0.0, self.left())),
            label=f"{size}: ",
        )
        for name, step in steps.items():
            found[name]["time"] = times[name]
            typical = times[name][TOTAL].median
            self.pace[size.case, size.precision, name] = typical / size.work
            first = found[name].pop("first")
            if name.endswith(COMPILED) and first > 2 * typical:  # else it was compiled for another row
                found[name]["compile"] = first - typical
            if DEVICE == "cuda" and typical < SMALL and (graphs := _gpu.captured(step.phases)):
                replay = _measure.interleaved_phases(
                    {name: graphs}, repeats=4 * self.repeats, label=f"{size}, replayed: "
                )
                found[name]["replay"] = replay[name]
        return {**size._asdict(), "main": main, "competitors": found}

    def why_not(self, size: Size, name: str, spare: float) -> str | None:
        step = self.predicted(size, name)
        if name != OURS and step and (step > self.patience or spare < 0):
            return f"left out: {step:.1f} s a step by its pace so far"
        return lacks_package(name) or lacks_memory(size.case, name, *size[1:])

    def begin(self, size: Size, name: str, problem: Problem) -> tuple[Step, float]:
        """A competitor's step after its first, checked call, and how long that took."""
        step = problem.step(size.case, name, size.precision)
        started = time.perf_counter()
        step()
        synchronize()
        taken = time.perf_counter() - started
        check(size.case, name, size.precision, step.result(), size.pairs, size.width)
        return step, taken


def memory_call(case: str, who: str, precision: str, pairs: int, width: int) -> Callable[[], Any]:
    """For :func:`benchmarks._measure.peak_memory`: one step, after a small one has loaded the libraries.

    Of what is compiled the warm-up has the same size, since each size is compiled by itself.
    """
    Problem(pairs if who.endswith(COMPILED) else 64, width).step(case, who, precision)()
    return Problem(pairs, width).step(case, who, precision)


def peak(size: Size, who: str) -> int:
    """Extra bytes of a step at its peak, in a fresh process."""
    arguments = (size.case, who, size.precision, size.pairs, size.width)
    return _measure.peak_memory("benchmarks.losses", "memory_call", *arguments)


def add_peaks(row: dict[str, Any]) -> None:
    """Measure the memory of those of a row that were timed."""
    for name, entry in row["competitors"].items():
        if "time" in entry:
            entry["memory"] = peak(size_of(row), name)


def rates(precisions: Sequence[str]) -> dict[str, Any]:
    """What this machine's copy and matrix product reach: bytes/s read and written, operations/s."""
    size = min(COPY_BYTES, _measure.available_memory() // 16)
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = _measure.interleaved({"copy": lambda: target.copy_(source)}, repeats=9)["copy"].median
    side = _gpu.square() if DEVICE == "cuda" else MATRIX_SIDE
    found = {}
    for precision in precisions:
        a, b = torch.randn(2, side, side, device=DEVICE).to(HALF.get(precision, torch.float32)).unbind()
        with float32_products(precision):
            # on a CPU float32 goes to the library that our loss takes there
            out = a.new_empty(side, side)
            product = partial(torch.mm, a, b) if DEVICE == "cuda" else partial(blocked._product, a, b, out)
            times = _measure.interleaved({"matrix product": product}, repeats=9)
            found[precision] = 2 * side**3 / times["matrix product"].median
    return {"copy": 2 * size / copy, "matrix": found}


def traffic(size: Size) -> int:
    """Bytes that must move between memory and chip even with boundless caches: features in, gradients out,
    and on a GPU the strips of gradient tiles, written and read again by two products.
    """
    width = torch.finfo(HALF.get(size.precision, torch.float32)).bits // 8
    full = size.case == "full"
    features = (4 if full else 2) * size.pairs * size.width * width
    strips = 3 * (3 if full else 1) * size.pairs**2 * width if DEVICE == "cuda" else 0
    return 2 * features + 2 * size.pairs * size.width * width + strips


def measure(
    *,
    quick: bool = False,
    cases: list[str] | None = None,
    precisions: list[str] | None = None,
    pairs: int = 4096,
    width: int = 512,
    sweep: list[int] | None = None,
    widths: list[int] | None = None,
    repeats: int = 7,
    seconds: float = 20.0,
    patience: float = 15.0,
    budget: float = 480.0,
) -> dict[str, Any]:
    """Time and memory of the loss.

    Args:
        quick: the main sizes of two cases, the rest small; nothing compiled, no larger batches.
        cases: of full, mpm-nce, mpm-nce-2 and clip; all by default.
        precisions: of fp32, tf32, bf16 and fp16; by default all that this machine multiplies in.
        pairs: N of the main table.
        width: D of the main table.
        sweep: the N of the second table; 512 to 65536 by default.
        widths: the D of the second table; 512, 768 and 1280 by default.
        repeats: most turns of a row; three at least.
        seconds: for the turns of a row of the main table, a quarter of it for others.
        patience: seconds a step may take before a competitor of ours is left out.
        budget: seconds for everything; rows that would take longer are left out, the largest first.
    """
    cases, precisions = list(cases or CASES), list(precisions or precisions_here())
    if unknown := [x for x in (*cases, *precisions) if x not in CASES and x not in TOLERANCE]:
        raise SystemExit(
            f"{', '.join(unknown)}: cases are {', '.join(CASES)}; precisions {', '.join(TOLERANCE)}"
        )
    bench = Bench(budget, 3 if quick else repeats, patience)
    main, small = min(pairs, DISTINCT), min(pairs, 1024)
    growth: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    with fresh_compiler_cache():
        if quick:
            rows = _quick(bench, cases, precisions, pairs, small, width)
        else:
            start_compiler()
            rows = []
            for case in cases:
                for precision in precisions:
                    size = Size(case, precision, main if case.startswith("mpm-nce") else pairs, width)
                    progress(f"losses: {size}")
                    rows.append(bench.row(size, everyone(case), seconds, main=True))
            for row in rows:
                progress(f"losses: memory of {row['case']}, {row['precision']}")
                add_peaks(row)
            growth = _growth([c for c in ("full", "clip") if c in cases], precisions[0], pairs, width)
            done = {size_of(row) for row in rows}
            sizes = [
                Size(case, precision, n, d)
                for case in cases
                if case in ("full", "clip")
                for precision in precisions
                for n in sweep or SWEEP
                for d in widths or WIDTHS
            ]
            more, left_out = _sweep(bench, [s for s in sizes if s not in done], width, seconds / 4)
            rows += more
    return {
        "device": DEVICE,
        "main": {"pairs": pairs, "width": width},
        "rows": rows,
        "growth": growth,
        "left_out": left_out,
        "rates": rates(precisions),
    }


def _quick(
    bench: Bench, cases: Sequence[str], precisions: Sequence[str], pairs: int, small: int, width: int
) -> list[dict[str, Any]]:
    rows = []
    for case in cases:
        for precision in precisions:
            main = case in ("full", "clip") and precision == "fp32"
            size = Size(case, precision, pairs if main else small, width)
            progress(f"losses: {size}")
            rows.append(bench.row(size, [OURS, theirs(case)], seconds=10.0, main=main))
    add_peaks(rows[-1])
    return rows


def _growth(cases: Sequence[str], precision: str, pairs: int, width: int) -> list[dict[str, Any]]:
    """Memory as the batch doubles, in fresh processes."""
    found = []
    for case in cases:
        for n in (pairs // 4, pairs // 2, pairs, 2 * pairs):
            size = Size(case, precision, n, width)
            progress(f"losses: memory of {size}")
            peaks = {
                who: peak(size, who)
                for who in (OURS, theirs(case))
                if not lacks_memory(case, who, precision, n, width)
            }
            found.append({"case": case, "precision": precision, "pairs": n, "memory": peaks})
    return found


def _sweep(
    bench: Bench, sizes: Sequence[Size], main_width: int, seconds: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows in the order of their work, as many as the budget allows, and the sizes of the others.

    The main table's width comes earlier, so that its curve gets long.
    """
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for size in sorted(sizes, key=lambda s: s.work * (1 if s.width == main_width else 8)):
        who = [OURS, theirs(size.case)]
        if size.width == main_width and size.precision == "fp32":
            who.append(theirs(size.case) + COMPILED)
        if size.case == "clip" and DEVICE == "cuda":
            who.append(INF_CL)
        need = bench.needed(size, OURS)
        if need > bench.left():
            left_out.append({**size._asdict(), "seconds": need})
            continue
        progress(f"losses: {size}, {bench.left():.0f} s left")
        rows.append(bench.row(size, who, seconds))
    return rows, left_out


@contextmanager
def fresh_compiler_cache() -> Iterator[None]:
    """torch.compile begins with nothing on disk, so that its time is that of a first use."""
    with (
        tempfile.TemporaryDirectory(prefix="losses-compiled-") as folder,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        yield


def start_compiler() -> None:
    """What only the first compilation of a process pays, so that no competitor does."""
    try:
        torch.compile(lambda x: (x.softmax(0) + 1).sum())(torch.ones(64, device=DEVICE))
    except Exception as error:
        progress(f"losses: torch.compile does not work here: {type(error).__name__}")


# ---------------------------------------------------------------------------------------------------
# Showing.


def _timing(entry: dict[str, Any], phase: str = TOTAL) -> Timing:
    return Timing(**entry["time"][phase])


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


def _ours(row: dict[str, Any]) -> str:
    """The implementation of ours that the row's machine takes by itself: the first competitor."""
    return next(iter(row["competitors"]))


def _faster(row: dict[str, Any], who: str) -> float | None:
    """How many times the time of ours another one takes."""
    ours, other = row["competitors"][_ours(row)], row["competitors"].get(who, {})
    if "time" not in ours or "time" not in other:
        return None
    return _timing(other).median / _timing(ours).median


def _main_table(rows: list[dict[str, Any]]) -> str:
    """All competitors of one case at the main size."""
    lines = []
    for row in rows:
        for who, entry in row["competitors"].items():
            begin = [row["precision"], who]
            if "time" not in entry:
                lines.append([*begin, entry["note"], "", "", "", "", ""])
                continue
            faster = _faster(row, who)
            lines.append(
                [
                    *begin,
                    *(str(_timing(entry, phase)) for phase in (TOTAL, "forward", "backward")),
                    f"{faster:.2f}×" if faster and who != _ours(row) else "",
                    _mebibytes(entry["memory"]) if "memory" in entry else "",
                    f"{entry['compile']:.1f} s" if "compile" in entry else "",
                ]
            )
    header = ["", "", "forward + backward", "forward", "backward", "of ours", "extra memory", "compiling"]
    return table(header, lines)


def _sweep_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in sorted(
        rows, key=lambda r: (list(CASES).index(r["case"]), r["precision"], r["width"], r["pairs"])
    ):
        ours = row["competitors"][_ours(row)]
        others = []
        for who, entry in row["competitors"].items():
            if who != _ours(row):
                value = f"{_timing(entry)}, {_faster(row, who):.2f}×" if "time" in entry else entry["note"]
                others.append(f"{who}: {value}")
        size = [CASES[row["case"]], row["precision"], str(row["width"]), str(row["pairs"])]
        lines.append([*size, str(_timing(ours)), "; ".join(others)])
    return table(["", "", "D", "N", "ours", "others, and how many times ours they take"], lines)


def _replay_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            CASES[row["case"]], row["precision"], str(row["width"]), str(row["pairs"]), who,
            str(_timing(entry)),
            *(str(Timing(**entry["replay"][phase])) for phase in (TOTAL, "forward", "backward")),
        ]
        for row in rows
        for who, entry in row["competitors"].items()
        if "replay" in entry
    ]  # fmt: skip
    header = ["", "", "D", "N", "", "as called", "replayed: forward + backward", "forward", "backward"]
    return table(header, lines) if lines else ""


def _share_table(rows: list[dict[str, Any]], rates: dict[str, Any]) -> str:
    """How much of the machine's measured rates ours reaches."""
    lines = []
    for row in rows:
        entry = row["competitors"][_ours(row)]
        size = size_of(row)
        seconds = Timing(**entry.get("replay", entry["time"])[TOTAL]).median
        operations, moved = 2 * size.work / seconds, traffic(size) / seconds
        lines.append(
            [
                CASES[size.case], size.precision, str(size.width), str(size.pairs),
                f"{operations / 1e12:.3g}", f"{operations / rates['matrix'][size.precision]:.0%}",
                f"{moved / 1e9:.3g}", f"{moved / rates['copy']:.1%}",
            ]
        )  # fmt: skip
    header = ["", "", "D", "N", "TFLOP/s", "of the matrix rate", "GB/s", "of the copy rate"]
    return table(header, lines)


def report(results: dict[str, Any]) -> str:
    """The tables."""
    rows, main = results["rows"], results["main"]
    parts = []
    for case, name in CASES.items():
        if chosen := [row for row in rows if row["case"] == case and row["main"]]:
            sizes = ", ".join(sorted({f"N {row['pairs']}, D {row['width']}" for row in chosen}))
            parts.append(f"### {name[0].upper() + name[1:]}, {sizes}\n\n{_main_table(chosen)}")
        if chosen and case == "clip" and any(SIGLIP in row["competitors"] for row in chosen):
            parts.append(
                "SigLIP takes a sigmoid of each pair instead of a softmax: one matrix product less forward and "
                "another objective, so its result is not compared; its chunks are the ranks' parts, of which one "
                "process has one."
            )
    if others := [row for row in rows if not row["main"]]:
        parts.append(
            f"### Other sizes\n\nOf more than {DISTINCT} pairs each is there several times; the right loss and "
            f"gradients follow from one copy.\n\n{_sweep_table(others)}"
        )
    if results["left_out"]:
        parts.append("Left out, as the time given was not enough:\n\n" + _left_out(results["left_out"]))
    if results["growth"]:
        names = list(dict.fromkeys(who for point in results["growth"] for who in point["memory"]))
        lines = [
            [
                CASES[point["case"]], point["precision"], str(point["pairs"]),
                *(_mebibytes(point["memory"][who]) if who in point["memory"] else "" for who in names),
            ]
            for point in results["growth"]
        ]  # fmt: skip
        header = ["", "", "N", *names]
        parts.append(f"### Extra memory as the batch doubles, D {main['width']}\n\n{table(header, lines)}")
    rates = results["rates"]
    reached = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates["matrix"].items())
    shares = _share_table([row for row in rows if row["main"] or results["device"] == "cuda"], rates)
    parts.append(
        f"### Share of what the machine can do\n\nA large matrix product reaches {reached} TFLOP/s here, a large "
        f"copy {rates['copy'] / 1e9:.3g} GB/s, read and written. Ours, with the products that the algorithm needs "
        f"(4 forward and 8 backward for the whole objective, 1 and 3 else) and the bytes that must move even with "
        f"boundless caches:\n\n{shares}"
    )
    if replayed := _replay_table(rows):
        parts.append(
            f"### Small batches as replayed graphs: the device's time without Python's\n\n{replayed}"
        )
    return "\n\n".join(parts)


def _left_out(sizes: list[dict[str, Any]]) -> str:
    grouped: dict[str, list[str]] = {}
    for size in sizes:
        key = f"{CASES[size['case']]}, {size['precision']}, D {size['width']}"
        grouped.setdefault(key, []).append(f"{size['pairs']} (about {size['seconds']:.0f} s)")
    return "\n".join(f"* {key}: N {', '.join(listed)}" for key, listed in grouped.items())


def _main_row(results: dict[str, Any], case: str, precision: str) -> dict[str, Any] | None:
    found = (r for r in results["rows"] if r["main"] and (r["case"], r["precision"]) == (case, precision))
    return next(found, None)


def highlights(results: dict[str, Any]) -> list[Highlight]:
    """The whole objective and the CLIP loss at the main size."""
    found = []
    for case, precision in (("full", "fp32"), ("full", "bf16"), ("clip", "fp32"), ("clip", "bf16")):
        row = _main_row(results, case, precision)
        faster = row and _faster(row, theirs(case))
        if not row or not faster:
            continue

        def cell(who: str, entries: dict[str, Any] = row["competitors"]) -> str:
            entry = entries[who]
            memory = f", {_mebibytes(entry['memory'])}" if "memory" in entry else ""
            return f"{1e3 * _timing(entry).median:.4g} ms{memory}"

        what = f"{CASES[case]}, N {row['pairs']}, D {row['width']}, {precision}, forward + backward"
        found.append(
            Highlight(what, cell(_ours(row)), f"{theirs(case)}: {cell(theirs(case))}", f"{faster:.1f}×")
        )
    return found


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """Time and memory against the batch size; forward and backward at the main size."""
    width = results["main"]["width"]
    cases = [case for case in ("full", "clip") if any(row["case"] == case for row in results["rows"])]
    precision = results["rows"][0]["precision"]
    panels = []
    for case in cases:
        lines: dict[str, list[tuple[float, float, float, float]]] = {}
        for row in sorted(results["rows"], key=lambda r: r["pairs"]):
            if (row["case"], row["precision"], row["width"]) == (case, precision, width):
                for who, entry in row["competitors"].items():
                    if "time" in entry and who in (_ours(row), theirs(case), theirs(case) + COMPILED, INF_CL):
                        t = _timing(entry)
                        lines.setdefault(who, []).append((row["pairs"], t.median, t.low, t.high))
        title = f"{CASES[case]}, {precision}, D {width}"
        panels.append(_plots.Panel(title, "forward + backward", lines, _plots.seconds))
    for case in cases:
        lines = {}
        for point in results["growth"]:
            if point["case"] == case:
                for who, count in point["memory"].items():
                    lines.setdefault(who, []).append((point["pairs"], count, count, count))
        if lines:
            panels.append(_plots.Panel("", "extra memory", lines, _plots.mebibytes))
    bars = {}
    for case in cases:
        for name in dict.fromkeys(row["precision"] for row in results["rows"]):
            if row := _main_row(results, case, name):
                entries = {who: entry for who, entry in row["competitors"].items() if "time" in entry}
                bars[f"{CASES[case]}, {name}"] = {
                    who: [_timing(entry, phase).median for phase in ("forward", "backward")]
                    for who, entry in entries.items()
                }
    return {"batch-size": _plots.curves(panels, "pairs N"), "forward-and-backward": _plots.bars(bars)}


def exact(results: dict[str, Any]) -> dict[str, float]:
    """None: memory as counted is a part of its own."""
    return {}


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """The others' time divided by ours, at every size."""
    found = {}
    for row in results["rows"]:
        for who in (theirs(row["case"]), theirs(row["case"]) + COMPILED):
            if faster := _faster(row, who):
                name = f"{row['case']} {row['precision']} {row['pairs']}x{row['width']} vs {who}"
                found[name] = faster
    return found


if __name__ == "__main__":
    command_line(measure, report)
