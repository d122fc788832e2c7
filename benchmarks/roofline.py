"""Roofline estimates of the kernels: how long counted work takes at the least, by a card's data sheet.

A kernel takes at least as long as the busiest of its sides: products at the tensor cores' dense bfloat16 rate,
elementwise operations at one per lane and clock, exponentials at 16 per multiprocessor and clock, and bytes at the
memory's bandwidth. Three more come from the machine code of a visit (``visits``): its instructions at the rate at
which a multiprocessor starts them, what its shared memory carries at 128 bytes per clock, to which a shuffle adds
four for each lane, and the bytes of the second-level cache. Barriers have no rate on a data sheet: they are
counted and cost nothing here.

Assumed is that all of these overlap perfectly, that caches hold what is read again within one launch, that every
multiprocessor with a program computes at its peak clock (four resident warps and more, see ``machine_code``), and
that launches cost nothing. So these are floors. They are estimates, not measurements.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

from benchmarks.harness import ROOT, table
from benchmarks.visits import Visit, lanes
from benchmarks.work import OBJECTIVES, PASSES, gradient_bytes, tiles, visited_bytes
from tracer.kernels import _grid
from tracer.kernels._tiles import TABLES, Tile, cdiv, tiles_of


class Card(NamedTuple):
    """Peaks by data sheet, per second: dense bfloat16 FLOP, float32 FLOP, bytes of memory."""

    name: str
    tensor: float
    float32: float
    bandwidth: float
    multiprocessors: int
    lanes: int  # float32 multiply-adds of a multiprocessor per clock
    started: int  # instructions of a warp that a multiprocessor starts per clock
    cache: int  # bytes of the second-level cache per clock, of the whole card

    @property
    def operations(self) -> float:
        """Elementwise operations: a multiply-add counts as two FLOP, anything else takes its place."""
        return self.float32 / 2

    @property
    def clock(self) -> float:
        return self.operations / self.lanes / self.multiprocessors

    @property
    def exponentials(self) -> float:
        return self.operations * EXPONENTIALS / self.lanes


# Data sheets of NVIDIA's A100, H100 and DGX B200 (an eighth of it) and AMD's Instinct MI300X, without sparsity.
# 16 exponentials per clock: the CUDA programming guide's table of arithmetic throughput; on CDNA 3 a quarter of
# the 64 lanes, which pair other operations. Second-level caches: the white papers of A100 (5120 bytes per clock)
# and of CDNA 3 (2048 for each of eight dies); H100 and each of the two dies of B200 are taken to have A100's.
CARDS = {
    "sm_80": Card("A100 SXM 80 GB", 312e12, 19.5e12, 2.039e12, 108, 64, 4, 5120),
    "sm_90": Card("H100 SXM", 989e12, 67e12, 3.35e12, 132, 128, 4, 5120),
    "sm_100": Card("B200", 2250e12, 75e12, 8.0e12, 148, 128, 4, 10240),
    "gfx942": Card("MI300X", 1307e12, 163.4e12, 5.3e12, 304, 128, 1, 16384),
}
SHARED_BYTES, EXPONENTIALS = 128, 16  # of a multiprocessor per clock
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


def code_of(rows: list[dict[str, Any]], architecture: str, objective: str) -> dict[str, dict[str, Any]]:
    """Return the rows of :mod:`benchmarks.machine_code` that an objective runs on large batches, by pass."""
    chosen, tile = OBJECTIVES[objective], tiles(architecture, objective)
    return {
        when: row
        for when in PASSES
        for row in rows
        if row["kernel"] == when
        and row["architecture"] == architecture
        and row["bits"] == 16
        and row["width"] == 512
        and row["products"] == ("several" if chosen.has_teacher else "one")
        and row["options"] == ("all" if chosen.labelled else "none")
        and (*row["tile"], row["warps"], row["stages"]) == tile[when]
    }


def clocks(row: dict[str, Any], D: int) -> dict[str, float]:
    """Return the clocks of a multiprocessor that the visits of one tile take at the least, by side.

    ``row`` is a kernel of :mod:`benchmarks.machine_code`, ``D`` the width of the features.
    """
    card, deep = CARDS[row["architecture"]], row["tile"][2]
    more = cdiv(D, deep) - cdiv(row["width"], deep)
    visit = Visit(**row["visit"]).plus(Visit(**row["step"]), more)
    threads = lanes(row["architecture"]) * row["warps"]
    shuffled = 4 * threads * visit.shuffles
    return {
        "tensor cores": 2 * visit.multiply_adds * card.multiprocessors * card.clock / card.tensor,
        "instructions": visit.instructions * row["warps"] / card.started,
        "exponentials": visit.exponentials * threads / EXPONENTIALS,
        "shared memory": (visit.shared_bytes + shuffled) / SHARED_BYTES,
        "cache": visit.cache_bytes * card.multiprocessors / card.cache,
    }


def visits_table(rows: list[dict[str, Any]]) -> str:
    """Return what a visit executes in the kernels that large batches take, and its clocks by side, as Markdown."""
    header = [
        "",
        "objective",
        "pass",
        "tile",
        "warps",
        "instructions",
        "shuffles",
        "barriers",
        "exponentials",
    ]
    header += [
        "cache KB",
        "shared KB",
        "clocks of tensor cores",
        "instructions",
        "exponentials",
        "shared memory",
    ]
    lines = []
    for architecture in CARDS:
        for objective in OBJECTIVES:
            for when, row in code_of(rows, architecture, objective).items():
                visit, least = row["visit"], clocks(row, row["width"])
                counted = [visit[name] for name in ("instructions", "shuffles", "barriers", "exponentials")]
                moved = [visit[name] / 1000 for name in ("cache_bytes", "shared_bytes")]
                lines.append(
                    [architecture, objective, when, "×".join(map(str, row["tile"])), str(row["warps"])]
                    + [str(number) for number in counted]
                    + [f"{number:.0f}" for number in (*moved, *least.values())]
                )
    return table([*header, "cache"], lines)


def estimate(
    work: dict[str, Any], N: int, D: int, code: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Return the least seconds for N images and N texts of width D in bfloat16, by pass and side.

    ``work`` is a row of :mod:`benchmarks.work` of any size, whose tiles are the architecture's own. ``code`` are
    the kernels' rows by pass (:func:`code_of`), without which nothing is known of their instructions.
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
    for when, row in (code or {}).items():
        visits = cdiv(N, tile[when].block_n) * cdiv(N, tile[when].block_m)
        rate = card.clock * card.multiprocessors * busy[when]
        least = clocks(row, D)
        sides[when] |= {name: visits * least[name] / rate for name in least.keys() - sides[when].keys()}
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


def estimates(counted: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per architecture, objective and size, from :func:`counts` and the kernels' machine code."""
    return [
        estimate(work, *size, code_of(rows, work["architecture"], work["objective"]))
        for work in counted
        for size in SIZES
    ]


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
