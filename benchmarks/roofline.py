"""Roofline estimates of the kernels: how long counted work takes at the least, by a card's data sheet.

A kernel takes at least as long as the busiest of four sides: products at the tensor cores' dense bfloat16 rate,
elementwise operations at one per lane and clock, exponentials at 16 per multiprocessor and clock, and bytes at the
memory's bandwidth. Assumed is that the four overlap perfectly, that caches hold what is read again within one
launch, that every multiprocessor with a program computes at its peak clock (four resident warps and more, see
``machine_code``), and that launches cost nothing. So these are floors. They are estimates, not measurements.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

from benchmarks.harness import ROOT
from benchmarks.work import OBJECTIVES, PASSES, gradient_bytes, tiles, visited_bytes
from tracer.kernels import _grid
from tracer.kernels._tiles import TABLES, Tile, tiles_of


class Card(NamedTuple):
    """Peaks by data sheet, per second: dense bfloat16 FLOP, float32 FLOP, bytes of memory."""

    name: str
    tensor: float
    float32: float
    bandwidth: float
    multiprocessors: int
    lanes: int  # float32 multiply-adds of a multiprocessor per clock

    @property
    def operations(self) -> float:
        """Elementwise operations: a multiply-add counts as two FLOP, anything else takes its place."""
        return self.float32 / 2

    @property
    def exponentials(self) -> float:
        return self.operations * 16 / self.lanes


# Data sheets of NVIDIA's A100, H100 and DGX B200 (an eighth of it) and AMD's Instinct MI300X, without sparsity.
# 16 exponentials per clock: the CUDA programming guide's table of arithmetic throughput; on CDNA 3 a quarter of
# the 64 lanes, which pair other operations.
CARDS = {
    "sm_80": Card("A100 SXM 80 GB", 312e12, 19.5e12, 2.039e12, 108, 64),
    "sm_90": Card("H100 SXM", 989e12, 67e12, 3.35e12, 132, 128),
    "sm_100": Card("B200", 2250e12, 75e12, 8.0e12, 148, 128),
    "gfx942": Card("MI300X", 1307e12, 163.4e12, 5.3e12, 304, 128),
}
SIZES = ((4096, 512), (65536, 768))  # N images and texts, and D: a large batch of one GPU, and of many
PARAMETERS = {"ViT-B/32": 151_277_313, "ViT-L/14": 427_616_513}
AVERAGE_BYTES = 14  # per parameter: float32 student, bfloat16 copy
# Where the elementwise work of each tile is counted: many tiles per program, as in a large batch, and quick.
COUNTED = (256, 16, 4)


def counts(architectures: list[str]) -> list[dict[str, Any]]:
    """Return rows of :mod:`benchmarks.work`, counted in a process of its own, because this one compiles."""
    N, D, places = COUNTED
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.work", "--json"]
    command += [
        "--sizes",
        f"[[{N}, {D}]]",
        "--architectures",
        json.dumps(architectures),
        "--places",
        str(places),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"counting the work failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)["results"]["loss"]


def _strips(objective: str, N: int, D: int, tile: Tile) -> _grid.Strips:
    """Return the strips of a backward pass in bfloat16."""
    matrices = 3 if OBJECTIVES[objective].has_teacher else 1
    return _grid.strips(N, N, D, tile, matrices, itemsize=2)


def estimate(work: dict[str, Any], N: int, D: int) -> dict[str, Any]:
    """Return the least seconds for N images and N texts of width D in bfloat16, by pass and side.

    ``work`` is a row of :mod:`benchmarks.work` of any size, whose tiles are the architecture's own.
    """
    objective, architecture = work["objective"], work["architecture"]
    card, tile = CARDS[architecture], tiles(architecture, objective)
    operands = 1 + OBJECTIVES[objective].has_teacher  # student, and teacher
    cut = _strips(objective, N, D, tile["backward"])
    strips = len(cut.starts)
    product, features = 2 * N * N * D, N * D * 2 * operands  # FLOP of one, bytes of one side's operands
    visited = work["units"]["forward"]  # the backward pass visits again, then multiplies
    finished = work["units"]["backward"] - visited
    memory = {
        "forward": 2 * features,
        "backward": (1 + strips) * features + gradient_bytes(objective, N),
    }
    busy = {
        when: _grid.plan(rows, N, tile[when], card.multiprocessors).busy(card.multiprocessors)
        for when, rows in (("forward", N), ("backward", cut.height))
    }
    sides = {
        when: {
            "tensor cores": visited * product / card.tensor / busy[when],
            "elementwise": work["operations_per_logit"][when] * N * N / card.operations / busy[when],
            "exponentials": work["exponentials_per_logit"][when] * N * N / card.exponentials / busy[when],
            "memory": memory[when] / card.bandwidth,
        }
        for when in PASSES
    }
    sides["products"] = {
        "tensor cores": finished * product / card.tensor,
        "memory": _finishing_bytes(finished, strips, features, N, D) / card.bandwidth,
    }
    bound = {when: max(times, key=lambda side: times[side]) for when, times in sides.items()}
    uncached = {when: visited_bytes(objective, N, D, tile[when]) / card.bandwidth for when in PASSES}
    return {
        "architecture": architecture,
        "card": card.name,
        "objective": objective,
        "rows": N,
        "width": D,
        "strips": strips,
        "busy": busy,
        "estimate_seconds": {when: times[bound[when]] for when, times in sides.items()},
        "estimate_bound_by": bound,
        "estimate_sides": sides,
        "estimate_seconds_if_nothing_were_cached": {
            when: max(seconds, sides[when][bound[when]]) for when, seconds in uncached.items()
        },
    }


def _finishing_bytes(products: float, strips: int, features: int, N: int, D: int) -> float:
    """Return the bytes of the products that finish a backward pass.

    Gradient strips once per product; the other operands once per strip; float32 sums, read and written with every
    product, the texts' with every strip too.
    """
    return products * N * N * 2 + (1 + strips) * features + products / 2 * (1 + strips) * 8 * N * D


def estimate_sigmoid(
    architecture: str, operations: float, exponentials: float, N: int, D: int
) -> dict[str, float]:
    """Return the least seconds of the sigmoid form with one term and all gradients, in bfloat16, by step.

    One walk visits each tile once and stores its gradient, and two products finish. ``operations`` and
    ``exponentials`` are those of the walk per logit.
    """
    card, tile = CARDS[architecture], tiles_of(TABLES[architecture], "sigmoid", False, 16)[0]
    cut = _grid.strips(N, N, D, tile, matrices=1, itemsize=2)
    busy = _grid.plan(cut.height, N, tile, card.multiprocessors).busy(card.multiprocessors)
    strips, product, features = len(cut.starts), 2 * N * N * D, N * D * 2
    walk = (
        product / card.tensor / busy,
        operations * N * N / card.operations / busy,
        exponentials * N * N / card.exponentials / busy,
        ((1 + strips) * features + gradient_bytes("CLIP", N)) / card.bandwidth,
    )
    finishing = _finishing_bytes(2, strips, features, N, D)
    return {"walk": max(walk), "products": max(2 * product / card.tensor, finishing / card.bandwidth)}


def estimates(architectures: list[str]) -> list[dict[str, Any]]:
    """Return one row per architecture, objective and size."""
    return [estimate(work, *size) for work in counts(architectures) for size in SIZES]


def average_estimates(architectures: list[str]) -> list[dict[str, Any]]:
    """Return one row per architecture and model for the moving average of whole models, bound by memory alone."""
    return [
        {
            "architecture": name,
            "card": CARDS[name].name,
            "model": model,
            "estimate_seconds": AVERAGE_BYTES * numel / CARDS[name].bandwidth,
        }
        for name in architectures
        for model, numel in PARAMETERS.items()
    ]
