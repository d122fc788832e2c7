"""Work that the kernels really execute, counted in Triton's interpreter: products, operations, bytes, launches.

    python -m benchmarks.work
    python -m benchmarks.work --sizes '[[2048, 768]]' --architectures '[sm_80, gfx942]'

**Products** are given in units of one N×M×D product, 2·N·M·D floating-point operations: the operations of
every ``tl.dot`` of the kernels, padding included, plus those of the matrix products that finish the backward
pass, as torch's own counter sees them; the published formulation's are counted by torch likewise. The floor is
what the algorithm needs: one product per logit matrix forward; the same again, recomputed, and one per operand
gradient and matrix backward.

**Bytes** are all that the kernels load and store with their masks on, not those of the vendor's products.
The floor reads the operand tiles of a visit once and writes its gradient tiles once:

    tiles · (block_n + block_m) · D · bytes · (2 with a teacher, else 1)        forward, and again backward
    + N · M · bytes · (3 gradient matrices with a teacher, else 1)              backward

so labels, statistics, partials and their merging are what lies above it.

**Operations** are elementwise floating-point operations and entries of reductions, casts apart, and
**exponentials**, per logit. **Memory** is what the launchers allocate, as torch's allocator would see it, counted
on tensors that hold no data: bytes alive at once, gradients included. Nothing here is a measurement of time.
"""

from __future__ import annotations

import os

# Only the process that counts interprets, and it decides before Triton is imported.
if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import published
from benchmarks.counting import Allocated, counting
from benchmarks.harness import Highlight, command_line, progress, table
from benchmarks.work_of_forms import count_forms, exact_forms, report_forms
from tracer.kernels import _grid, average_triton, contrastive_triton
from tracer.kernels._tiles import TABLES, Tile, tiles_of
from tracer.kernels._triton import INTERPRETED, planning_for, recording
from tracer.kernels.contrastive import Inputs, Needs, Options


class Objective(NamedTuple):
    """A loss whose work is counted."""

    options: Options
    labelled: bool
    floor_units: dict[str, int]  # products that the algorithm needs, by pass

    @property
    def has_teacher(self) -> bool:
        """Whether student and teacher features are multiplied, four products a tile instead of one."""
        return self.options.relational or self.options.crossed

    def inputs(self, feature: Tensor, scale: Tensor, labels: Tensor) -> Inputs:
        """Build the inputs of a call from features [N, D], which serve for both towers and both models."""
        inputs = Inputs(feature, feature.flip(0), scale)
        if self.has_teacher:
            inputs = inputs._replace(teacher_image=feature, teacher_text=feature, teacher_logit_scale=scale)
        return inputs._replace(labels=labels, text_labels=labels) if self.labelled else inputs


MPM_NCE = Options(margin=0.05, smoothing=0.05)
OBJECTIVES = {
    "CLIP": Objective(Options(), False, {"forward": 1, "backward": 3}),
    "MPM-NCE": Objective(MPM_NCE, True, {"forward": 1, "backward": 3}),
    "full objective": Objective(
        MPM_NCE._replace(relational=True, interactive=True, cross=True), True, {"forward": 4, "backward": 8}
    ),
}
PASSES = ("forward", "backward")
# dtype of the parameters, of the copies, and the least bytes per parameter
AVERAGES = {
    "fp32": (torch.float32, None, 12),
    "fp32 + bf16 copy": (torch.float32, torch.bfloat16, 14),
    "bf16 + bf16 copy": (torch.bfloat16, torch.bfloat16, 12),
}
# Three chunks of 2048 and a rest; less than one; two exactly.
AVERAGED = ((96, 67), (768,), (64, 64))
MEMORY_ROWS, MEMORY_WIDTH = (8192, 16384), 512

Architecture = Literal["sm_80", "sm_90", "sm_100", "gfx942"]
ARCHITECTURES: tuple[Architecture, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")


def tiles(architecture: str, objective: str) -> dict[str, Tile]:
    """Return the tiles that large batches in 16 bits take, by pass."""
    chosen = OBJECTIVES[objective]
    form = "" if chosen.has_teacher or chosen.labelled else ", plain"
    table = TABLES[architecture]
    return {kernel: tiles_of(table, f"{kernel}{form}", chosen.has_teacher, 16)[0] for kernel in PASSES}


def visited_bytes(objective: str, N: int, D: int, tile: Tile) -> int:
    """Return the bytes in 16 bits of all operand tiles that a walk over N×N logits visits."""
    operands = 1 + OBJECTIVES[objective].has_teacher
    visits = math.prod(_grid.plan(N, N, tile, multiprocessors=1).tiles)
    return visits * (tile.block_n + tile.block_m) * D * 2 * operands


def gradient_bytes(objective: str, N: int) -> int:
    """Return the bytes in 16 bits of the gradients of all logits, which pass through the strips."""
    return N * N * 2 * (3 if OBJECTIVES[objective].has_teacher else 1)


def count(objective: str, N: int, D: int, architecture: str = "sm_90", places: int = 132) -> dict[str, Any]:
    """Run an objective of N images and N texts of width D in float16 and count its work.

    The tiles are ``architecture``'s, the grids those of ``places`` multiprocessors. The inner blocks are widened
    to D: fewer, larger steps of the same work.
    """
    counted = OBJECTIVES[objective]
    generator = torch.Generator().manual_seed(0)
    feature = torch.nn.functional.normalize(torch.randn(N, D, generator=generator), dim=1).half()
    inputs = counted.inputs(feature, torch.tensor(20.0), torch.arange(N) // 2)
    tile = {kernel: t._replace(block_d=D) for kernel, t in tiles(architecture, objective).items()}
    with planning_for(architecture, places):
        with counting() as ahead:
            saved = contrastive_triton.forward(inputs, counted.options, tile=tile["forward"]).saved
        with FlopCounterMode(display=False) as products, counting() as back:
            contrastive_triton.backward(
                torch.ones(4), inputs, saved, counted.options, Needs(), tile=tile["backward"]
            )
    back.flops += products.get_total_flops()
    floor_bytes = {kernel: visited_bytes(objective, N, D, tile[kernel]) for kernel in PASSES}
    floor_bytes["backward"] += gradient_bytes(objective, N)
    both = dict(zip(PASSES, (ahead, back), strict=True))
    return {
        "objective": objective,
        "architecture": architecture,
        "rows": N,
        "width": D,
        "units": {name: work.flops / (2 * N * N * D) for name, work in both.items()},
        "floor_units": counted.floor_units,
        "published_units": _published_units(objective, N, D),
        "bytes": {name: work.loaded + work.stored for name, work in both.items()},
        "floor_bytes": floor_bytes,
        "launches": {name: work.launches for name, work in both.items()},
        "operations_per_logit": {name: work.operations / N**2 for name, work in both.items()},
        "exponentials_per_logit": {name: work.exponentials / N**2 for name, work in both.items()},
    }


def _published_units(objective: str, N: int, D: int) -> float:
    """Return the products of the published formulation, forward and backward, as torch counts them."""
    image, text, scale = torch.randn(N, D), torch.randn(N, D), torch.tensor(1.0)
    teacher = (image.clone(), text.clone(), scale)
    student = [t.requires_grad_() for t in (image, text, scale)]
    formulations: dict[str, Callable[[], Tensor]] = {
        "CLIP": lambda: published.clip_loss(image, text, scale),
        "MPM-NCE": lambda: published.mpm_nce_loss(image, text, scale, torch.arange(N) // 2, 0.05, 0.05),
        "full objective": lambda: published.tracer_loss(
            image, text, scale, *teacher, relational=1, interactive=1, cross=1, feature=1
        ),
    }
    with FlopCounterMode(display=False) as products:
        torch.autograd.grad(formulations[objective](), student)
    return products.get_total_flops() / (2 * N * N * D)


def count_average(mode: str) -> dict[str, Any]:
    """Return bytes and launches of one update of the moving average, the table of chunks included."""
    dtype, low, floor = AVERAGES[mode]
    averages = [torch.zeros(shape) for shape in AVERAGED]
    params = [torch.ones(shape, dtype=dtype) for shape in AVERAGED]
    copies = [torch.zeros(shape, dtype=low) for shape in AVERAGED] if low else None
    with counting() as work:
        average_triton.average_(averages, params, 0.5, copies)
    numel = sum(t.numel() for t in averages)
    return {
        "mode": mode,
        "launches": work.launches,
        "bytes_per_parameter": (work.loaded + work.stored) / numel,
        "floor_bytes_per_parameter": floor,
    }


def count_memory(objective: str, N: int, D: int, architecture: str, places: int) -> dict[str, Any]:
    """Return the bytes that the launchers allocate for N images and N texts of width D in bfloat16.

    They run on a GPU's tensors without data: what is allocated is what would be, nothing is computed.
    """
    counted, tile = OBJECTIVES[objective], tiles(architecture, objective)
    with planning_for(architecture, places), recording(execute=False), FakeTensorMode():
        on_gpu = partial(torch.empty, device="cuda")
        labels, feature = on_gpu(N, dtype=torch.int64), on_gpu(N, D, dtype=torch.bfloat16)
        inputs, upstream = counted.inputs(feature, on_gpu(()), labels), on_gpu(4)
        with Allocated((inputs, upstream)) as made:
            result = contrastive_triton.forward(inputs, counted.options, tile=tile["forward"])
            ahead, saved = made.peak, made.alive
            made.peak = 0
            contrastive_triton.backward(
                upstream, inputs, result.saved, counted.options, Needs(), tile=tile["backward"]
            )
    return {
        "objective": objective,
        "architecture": architecture,
        "rows": N,
        "width": D,
        "forward": ahead,
        "saved": saved,
        "backward": made.peak,
        "matrix": 2 * N * N,
    }


def measure(
    *,
    quick: bool = False,
    sizes: list[tuple[int, int]] | None = None,
    architectures: list[Architecture] | None = None,
    places: int = 132,
) -> dict[str, Any]:
    """Count the work of the loss and of the moving average, and the memory of the loss.

    Args:
        quick: only N 512, D 256 with sm_90's tiles; without it the other architectures' too, and N 1024, D 512.
        sizes: pairs of N, images and texts, and D, their width, to be counted instead.
        architectures: whose tiles to count with instead.
        places: multiprocessors of the GPU whose grids are counted.

    Raises:
        SystemExit: Triton is not interpreting.
    """
    if not INTERPRETED:
        raise SystemExit("work is counted in Triton's interpreter: set TRITON_INTERPRET=1")
    if quick or sizes or architectures:
        plan = [(arch, *size) for size in sizes or [(512, 256)] for arch in architectures or ("sm_90",)]
    else:
        plan = [*((arch, 512, 256) for arch in ARCHITECTURES), ("sm_90", 1024, 512)]
    rows = []
    for arch, N, D in plan:
        for objective in OBJECTIVES:
            progress(f"{objective}, N {N}, D {D}, tiles of {arch}")
            rows.append(count(objective, N, D, arch, places))
    return {
        "places": places,
        "loss": rows,
        "forms": count_forms("sm_90", places),
        "average": [count_average(mode) for mode in AVERAGES],
        "memory": [
            count_memory(objective, N, MEMORY_WIDTH, "sm_90", places)
            for objective in OBJECTIVES
            for N in MEMORY_ROWS
        ],
    }


def report(results: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    return "\n\n".join(
        [
            f"Counted in Triton's interpreter, not timed; float16, grids of {results['places']} multiprocessors.",
            "Products in units of 2·N·M·D operations, and bytes that the kernels load and store:",
            _work_table(results["loss"]),
            "The forms of the contrastive term. The sigmoid makes its gradients in the forward pass:",
            report_forms(results["forms"]),
            "Elementwise operations and exponentials per logit, and launches, forward + backward:",
            _operations_table(results["loss"]),
            "Moving average, launches and bytes per parameter:",
            _average_table(results["average"]),
            "Memory that the launchers allocate, bfloat16, gradients of the features included, beside one matrix "
            f"of logits in 16 bits; D = {MEMORY_WIDTH}, strips of {_grid.STRIP_BYTES >> 20} MiB or, where "
            "these are larger, as large as the gradients:",
            _memory_table(results["memory"]),
        ]
    )


def _work_table(rows: list[dict[str, Any]]) -> str:
    header = ["objective", "tiles of", "N", "D", "products forward", "backward", "sum", "floor", "published"]
    header += ["MB forward", "backward", "of the floor"]
    lines = []
    for r in rows:
        units, moved = r["units"].values(), r["bytes"].values()
        lines.append(
            [
                r["objective"],
                r["architecture"],
                str(r["rows"]),
                str(r["width"]),
                *(f"{u:.2f}" for u in units),
                f"{sum(units):.2f}",
                str(sum(r["floor_units"].values())),
                f"{r['published_units']:g}",
                *(f"{b / 1e6:.1f}" for b in moved),
                f"{sum(moved) / sum(r['floor_bytes'].values()):.3f}",
            ]
        )
    return table(header, lines)


def _operations_table(rows: list[dict[str, Any]]) -> str:
    def both(r: dict[str, Any], what: str, form: str) -> str:
        return " + ".join(format(r[what][name], form) for name in PASSES)

    return table(
        ["objective", "tiles of", "N", "operations", "exponentials", "launches"],
        [
            [
                r["objective"],
                r["architecture"],
                str(r["rows"]),
                both(r, "operations_per_logit", ".1f"),
                both(r, "exponentials_per_logit", ".2f"),
                both(r, "launches", "d"),
            ]
            for r in rows
        ],
    )


def _average_table(rows: list[dict[str, Any]]) -> str:
    return table(
        ["parameters", "launches", "bytes per parameter", "floor"],
        [
            [
                r["mode"],
                str(r["launches"]),
                f"{r['bytes_per_parameter']:.2f}",
                str(r["floor_bytes_per_parameter"]),
            ]
            for r in rows
        ],
    )


def _memory_table(rows: list[dict[str, Any]]) -> str:
    def mebibytes(n: int) -> str:
        return f"{n / 2**20:.1f}"

    before: dict[str, dict[str, Any]] = {}
    lines = []
    for r in rows:
        half = before.get(r["objective"])
        lines.append(
            [
                r["objective"],
                str(r["rows"]),
                *(mebibytes(r[name]) for name in ("forward", "saved", "backward", "matrix")),
                " / ".join(f"{r[name] / half[name]:.2f}" for name in ("forward", "backward")) if half else "",
            ]
        )
        before[r["objective"]] = r
    header = ["objective", "N", "MiB forward", "saved", "backward", "one matrix", "growth as N doubles"]
    return table(header, lines)


def highlights(results: dict[str, Any]) -> list[Highlight]:
    """Return the whole objective's products at the largest size counted."""
    rows = [r for r in results["loss"] if r["objective"] == "full objective"]
    largest = max(rows, key=lambda r: r["rows"])
    ours, published_units = sum(largest["units"].values()), largest["published_units"]
    name = f"products of the whole objective, counted, N {largest['rows']}"
    return [
        Highlight(
            name,
            f"{ours:.2f} N²D",
            f"{published_units:g} N²D (published formulation)",
            f"{published_units / ours:.2f}×",
        )
    ]


def exact(results: dict[str, Any]) -> dict[str, float]:
    """Return every count by name."""
    numbers: dict[str, float] = {}
    for r in results["loss"]:
        name = f"work {r['objective']} {r['architecture']} {r['rows']}x{r['width']}"
        for what in ("units", "bytes", "launches", "operations_per_logit", "exponentials_per_logit"):
            for when, value in r[what].items():
                numbers[f"{name} {what.replace('_', ' ')} {when}"] = value
    numbers |= exact_forms(results["forms"])
    for r in results["average"]:
        for what in ("launches", "bytes_per_parameter"):
            numbers[f"work moving average {r['mode']} {what.replace('_', ' ')}"] = r[what]
    for r in results["memory"]:
        for when in ("forward", "saved", "backward"):
            numbers[f"memory {r['objective']} {r['architecture']} {r['rows']}x{r['width']} {when}"] = r[when]
    return numbers


if __name__ == "__main__":
    command_line(measure, report)
