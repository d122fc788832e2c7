"""Work that the loss kernels really execute, counted in Triton's interpreter: products and bytes.

    python -m benchmarks.work [--rows 1024] [--width 512] [--arch sm_90]

**Products** are given in units of one N×M×D product, 2·N·M·D floating-point operations: the operations of
every ``tl.dot`` of the kernels, padding included, plus those of the matrix products that finish the backward
pass, as torch's own counter sees them. The floor is what the algorithm needs: one product per logit matrix
forward; the same again, recomputed, and one per operand gradient and matrix backward.

**Bytes** are all that the kernels load and store with their masks on, not those of the vendor's products.
The floor reads the operand tiles of a visit once and writes its gradient tiles once:

    tiles · (block_n + block_m) · D · bytes · (2 with a teacher, else 1)        forward, and again backward
    + N · M · bytes · (3 gradient matrices with a teacher, else 1)              backward

so labels, statistics, partials and their merging are what lies above it. Nothing here is a measurement of time.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime import interpreter

from tracer.kernels import _config, contrastive
from tracer.kernels._triton import INTERPRETED

loss: Any = contrastive  # called with unpacked arguments, which the type checker can't count
FULL, CLIP = (True,) * 4, (True, False, False, False)
# (terms, has labels, margin and smoothing) of what is counted, and its floor in units: forward, backward
OBJECTIVES = {
    "CLIP": (CLIP, False, 1, 3),
    "MPM-NCE": (CLIP, True, 1, 3),
    "full objective": (FULL, True, 4, 8),
}


@dataclass
class Work:
    """Floating-point operations of products, bytes loaded and bytes stored."""

    flops: int = 0
    loaded: int = 0
    stored: int = 0


@contextmanager
def counting() -> Iterator[Work]:
    """Count what interpreted kernels do within."""
    work, builder = Work(), interpreter.InterpreterBuilder
    dot, load, store = builder.create_dot, builder.create_masked_load, builder.create_masked_store

    def create_dot(self, a, b, d, *options):
        work.flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, d, *options)

    def create_masked_load(self, ptrs, mask, *options):
        work.loaded += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return load(self, ptrs, mask, *options)

    def create_masked_store(self, ptrs, value, mask, *options):
        work.stored += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return store(self, ptrs, value, mask, *options)

    builder.create_dot = create_dot
    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
    try:
        yield work
    finally:
        builder.create_dot = dot
        builder.create_masked_load, builder.create_masked_store = load, store


@dataclass(frozen=True)
class Count:
    """Counted work of one objective, forward and backward, beside its floor."""

    objective: str
    units: tuple[float, float]
    floor_units: tuple[int, int]
    bytes: tuple[int, int]
    floor_bytes: tuple[int, int]

    @property
    def total_units(self) -> float:
        return sum(self.units)

    @property
    def byte_ratio(self) -> float:
        return sum(self.bytes) / sum(self.floor_bytes)


def count(objective: str, N: int, D: int, arch: str = "sm_90", places: int = 132) -> Count:
    """Run an objective of N images and N texts of width D in float16 with ``arch``'s tiles on ``places``
    multiprocessors, and count. The inner blocks are widened to D: fewer, larger steps of the same work.
    """
    enabled, labelled, *floor_units = OBJECTIVES[objective]
    many = enabled == FULL
    generator = torch.Generator().manual_seed(0)
    feature = torch.nn.functional.normalize(torch.randn(N, D, generator=generator), dim=1).half()
    y = torch.arange(N) // 2 if labelled else None
    option = 0.05 if labelled else 0.0
    scale = torch.tensor(20.0)
    teacher = (feature, feature, scale) if many else (None, None, None)
    arguments: Any = (feature, feature.flip(0), scale, y, y, *teacher)
    tiles = {
        kernel: _config.TABLES[arch][kernel, many, 16][0]._replace(block_d=D)
        for kernel in ("forward", "backward")
    }
    kept = _config._multiprocessors
    _config._multiprocessors = lambda device: places  # type: ignore[assignment]
    try:
        with counting() as ahead:
            _, rows, cols, _ = loss.forward(*arguments, option, option, enabled, False, tile=tiles["forward"])
        counter = FlopCounterMode(display=False)
        with counting() as back, counter:
            loss.backward(
                torch.ones(4), *arguments, rows, cols, option, option, enabled, (True, True, True),
                tile=tiles["backward"],
            )  # fmt: skip
    finally:
        _config._multiprocessors = kept

    def operands(kernel: str) -> int:
        n, m = tiles[kernel][:2]
        return -(-N // n) * -(-N // m) * (n + m) * D * 2 * (2 if many else 1)

    unit = 2 * N * N * D
    return Count(
        objective,
        (ahead.flops / unit, (back.flops + counter.get_total_flops()) / unit),
        (floor_units[0], floor_units[1]),
        (ahead.loaded + ahead.stored, back.loaded + back.stored),
        (operands("forward"), operands("backward") + N * N * 2 * (3 if many else 1)),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Products and bytes of the loss kernels beside their floor.")
    parser.add_argument("--rows", type=int, default=1024, help="images, and texts")
    parser.add_argument("--width", type=int, default=512, help="feature width D")
    parser.add_argument("--arch", choices=sorted(set(_config.TABLES) - {"interpreter"}), default="sm_90")
    chosen = parser.parse_args()
    if not INTERPRETED:
        sys.exit("TRITON_INTERPRET=0: work is counted in the interpreter, unset it")
    print(f"N = M = {chosen.rows}, D = {chosen.width}, float16, tiles of {chosen.arch}; counted, not timed\n")
    print("| objective | units forward | backward | sum | floor | MB forward | backward | of the floor |")
    print("|" + "---|" * 8)
    for objective in OBJECTIVES:
        c = count(objective, chosen.rows, chosen.width, chosen.arch)
        print(
            f"| {objective} | {c.units[0]:.2f} | {c.units[1]:.2f} | {c.total_units:.2f} | {sum(c.floor_units)} "
            f"| {c.bytes[0] / 1e6:.1f} | {c.bytes[1] / 1e6:.1f} | {c.byte_ratio:.3f} |"
        )


if __name__ == "__main__":
    main()
