"""The loss across ranks: time, memory, products and received bytes, beside open_clip's and the published one.

    python -m benchmarks.ranks                       1, 2 and 4 ranks on this machine, a thread each, over gloo
    python -m benchmarks.ranks --quick
    python -m benchmarks.ranks --ranks '[2]' --pairs 8192 --precisions '[fp32]'

The same batch is divided over the ranks. open_clip takes ``local_loss`` and ``gather_with_grad``, its fastest way;
the published objective is computed as it is written, by each rank, on the gathered features of all ranks. A
competitor is timed only after the check of its loss and of all gradients against one process. Times are those of
the slowest rank, forward and backward, medians of interleaved turns.

**Products** are counted in units of one product over a rank's rectangle of the logit matrix, 2·N·N·D/R
operations, from the shapes of all products that torch records. **Received** bytes are counted from the arguments
of the collectives. **Memory** is what torch hands out at the peak, beyond the inputs, on the rank with the most.
All three are the same at every run. What runs each rank is in ``rank_worker.py``.
"""

from __future__ import annotations

import json
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks import rank_worker
from benchmarks.competitors import CASES, OPEN_CLIP, Problem, baseline
from benchmarks.harness import Highlight, command_line, progress, table
from benchmarks.measure import Timing
from benchmarks.rank_worker import GATHERED, MESH, RING, Plan
from tracer._mesh import default_shape

MEASURED = ("clip", "full")
QUICK = 1024  # pairs


def measure(
    *,
    quick: bool = False,
    ranks: list[int] | None = None,
    cases: list[str] | None = None,
    precisions: list[str] | None = None,
    pairs: int = 4096,
    width: int = 512,
    repeats: int = 7,
) -> dict[str, Any]:
    """Measure the losses in worlds of ranks.

    Args: quick: 1024 pairs on 2 ranks, in float32, with few turns. ranks: sizes of the worlds; 1, 2 and 4 by
    default. cases: clip or full; both by default. precisions: fp32 or bf16; both by default. pairs: N of all ranks
    together, divisible by the numbers of ranks. width: D. repeats: turns of each competitor.
    """
    ranks = ranks or ([2] if quick else [1, 2, 4])
    cases, precisions = cases or list(MEASURED), precisions or (["fp32"] if quick else ["fp32", "bf16"])
    pairs, repeats = (min(pairs, QUICK), min(repeats, 3)) if quick else (pairs, repeats)
    if unknown := [*({*cases} - {*MEASURED}), *({*precisions} - {"fp32", "bf16"})]:
        raise SystemExit(f"unknown {', '.join(unknown)}: cases are clip and full; precisions fp32 and bf16")
    if odd := [world for world in ranks if pairs % world]:
        raise SystemExit(f"{pairs} pairs do not divide over {odd[0]} ranks: choose another --pairs")
    rows = []
    small = (
        [QUICK] if pairs > QUICK and not quick else []
    )  # the check of a quick run compares with these rows
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        expected = {
            (case, size): _expected(case, size, width, Path(folder))
            for case in cases
            for size in (*small, pairs)
        }
        for world_size in ranks:
            progress(f"ranks: {world_size}, {', '.join(cases)}")
            plans = [
                Plan(
                    case,
                    precision,
                    size,
                    width,
                    _competitors(case, world_size),
                    expected[case, size],
                    repeats,
                )
                for case in cases
                for precision in precisions
                for size in (*(small if (world_size, precision) == (2, "fp32") else ()), pairs)
            ]
            rows += _run(world_size, plans, Path(folder))
    return {"pairs": pairs, "width": width, "rows": rows}


def _competitors(case: str, world_size: int) -> list[str]:
    other = OPEN_CLIP if case == "clip" else GATHERED
    return [MESH, RING, other] if world_size > 1 else [MESH, other]


def _expected(case: str, pairs: int, width: int, folder: Path) -> str:
    """Write the loss and gradients of the whole batch on one process, by the case's baseline, to a file."""
    step = Problem(pairs, width, device="cpu").step(case, baseline(case), "fp32")
    step()
    path = folder / f"{case}-{pairs}.pt"
    torch.save(step.result(), path)
    return str(path)


def _run(world_size: int, plans: list[Plan], folder: Path) -> list[dict[str, Any]]:
    results = folder / "results.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (world_size, port, plans, results)
    mp.start_processes(rank_worker.main, arguments, nprocs=world_size, start_method="spawn")
    return json.loads(results.read_text())


# ---------------------------------------------------------------------------------------------------
# Tables.


def _other(row: dict[str, Any]) -> str:
    return next(name for name in row["competitors"] if not name.startswith("ours"))


def _named(row: dict[str, Any], name: str) -> str:
    if name != MESH or row["ranks"] == 1:
        return name
    rows, cols = default_shape(row["ranks"], row["ranks"])
    return f"ours, mesh {rows}×{cols}"


def _median(row: dict[str, Any], name: str) -> float:
    return row["competitors"][name]["time"]["median"]


def report(results: dict[str, Any]) -> str:
    """Return the tables: what was measured and counted, and what others' code takes by reading it."""
    lines = []
    for row in results["rows"]:
        other = _other(row)
        for name, entry in row["competitors"].items():
            faster = f"{_median(row, other) / _median(row, name):.2f}×" if name != other else ""
            lines.append([
                CASES[row["case"]],
                row["precision"],
                str(row["pairs"]),
                str(row["ranks"]),
                _named(row, name),
                str(Timing(**entry["time"])),
                faster,
                f"{entry['memory'] / 2**20:.1f}",
                f"{entry['units']:.2f}",
                f"{entry['received'] / 2**20:.2f}",
            ])  # fmt: skip
    header = ["", "", "N", "ranks", "", "step (measured)", "faster", "MiB (counted)", "products (counted)"]
    size = f"N pairs over all ranks, D {results['width']}"
    measured = table([*header, "MiB received (counted)"], lines)
    return f"{size}, forward and backward\n\n{measured}\n\n{_by_formula(results)}"


def _by_formula(results: dict[str, Any]) -> str:
    """Return the table of two packages that need a GPU: what their code and its authors' texts say, by formula."""
    n, d = results["pairs"], results["width"]
    lines = []
    for ranks in sorted({row["ranks"] for row in results["rows"]} - {1}):
        share = 1 - 1 / ranks
        for name, units, received, held in (
            ("memeff 0.3.1", 4, (8 * d + 8) * n * share, (8 + 4 / ranks) * n * d),
            ("Inf-CL", 10, 24 * n * d * share, 65 * n * d / ranks),
        ):
            lines.append([str(ranks), name, str(units), f"{received / 2**20:.2f}", f"{held / 2**20:.1f}"])
    if not lines:
        return ""
    header = ["ranks", "", "products", "MiB received", "MiB held"]
    return (
        "The CLIP loss in float32 of two packages that need a GPU, by formula instead of measured. memeff "
        "assembles one tower on every rank by a ring and scatters its gradient: 8 bytes · N·D, and it holds both "
        "whole. Inf-CL sends features round a ring twice, 24 bytes · N·D, and holds up to 65 bytes · N·D/R by its "
        f"authors' measurements.\n\n{table(header, lines)}"
    )


def highlights(results: dict[str, Any]) -> list[Highlight]:
    """Return rows for the README: time in float32 on 2 ranks, and what a rank receives for the CLIP loss."""
    rows = [
        row
        for row in results["rows"]
        if row["ranks"] == 2 and row["precision"] == "fp32" and row["pairs"] == results["pairs"]
    ]
    lines = []
    for row in rows:
        other, ours = row["competitors"][_other(row)], row["competitors"][MESH]
        what = f"{CASES[row['case']]} on 2 ranks, fp32, N {row['pairs']}, D {row['width']}"
        lines.append(
            Highlight(
                what,
                f"{1e3 * ours['time']['median']:.0f} ms",
                f"{1e3 * other['time']['median']:.0f} ms, {_other(row)}",
                f"{other['time']['median'] / ours['time']['median']:.1f}×",
            )
        )
        if row["case"] == "clip":
            lines.append(
                Highlight(
                    f"received by a rank, {what}",
                    f"{ours['received'] / 2**20:.1f} MiB",
                    f"{other['received'] / 2**20:.1f} MiB, {_other(row)}",
                    f"{other['received'] / ours['received']:.1f}×",
                )
            )
    return lines


def exact(results: dict[str, Any]) -> dict[str, float]:
    """Return the products and received bytes of every row."""
    numbers = {}
    for row in results["rows"]:
        size = f"{row['case']} {row['precision']} N {row['pairs']} D {row['width']}, {row['ranks']} ranks"
        for name, entry in row["competitors"].items():
            numbers[f"{size}: {name}, products"] = entry["units"]
            numbers[f"{size}: {name}, bytes received"] = entry["received"]
    return numbers


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Return, by row, the time of the others divided by ours."""
    return {
        f"{row['case']} {row['precision']} N {row['pairs']}, {row['ranks']} ranks: {_other(row)} / {name}": (
            _median(row, _other(row)) / _median(row, name)
        )
        for row in results["rows"]
        for name in row["competitors"]
        if name.startswith("ours")
    }


if __name__ == "__main__":
    command_line(measure, report)
