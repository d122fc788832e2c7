"""What the benchmark of the loss shows: tables, the README's rows, pictures, and the ratios that are watched."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import _plots
from benchmarks._competitors import (
    CASES,
    COMPILED,
    DISTINCT,
    HALF,
    INF_CL,
    SIGLIP,
    Size,
    size_of,
    theirs,
)  # fmt: skip
from benchmarks._measure import TOTAL, Timing, table
from benchmarks._part import Highlight


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


def traffic(size: Size, device: str) -> int:
    """Bytes that must move between memory and chip even with boundless caches: features in, gradients out,
    and on a GPU the strips of gradient tiles, written and read again by two products.
    """
    width = torch.finfo(HALF.get(size.precision, torch.float32)).bits // 8
    full = size.case == "full"
    features = (4 if full else 2) * size.pairs * size.width * width
    strips = 3 * (3 if full else 1) * size.pairs**2 * width if device == "cuda" else 0
    return 2 * features + 2 * size.pairs * size.width * width + strips


def _share_table(rows: list[dict[str, Any]], rates: dict[str, Any], device: str) -> str:
    """How much of the machine's measured rates ours reaches."""
    lines = []
    for row in rows:
        entry = row["competitors"][_ours(row)]
        size = size_of(row)
        seconds = Timing(**entry.get("replay", entry["time"])[TOTAL]).median
        operations, moved = 2 * size.work / seconds, traffic(size, device) / seconds
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
                "another objective, checked against its own definition; its chunks are the ranks' parts, of which "
                "one process has one."
            )
        if case == "clip" and any("time" in row["competitors"].get(INF_CL, {}) for row in chosen):
            parts.append(
                "Inf-CL widens features to float32 and multiplies in TF32, in every precision's rows."
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
    device = results["device"]
    shares = _share_table([row for row in rows if row["main"] or device == "cuda"], rates, device)
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


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """The others' time divided by ours, at every size."""
    found = {}
    for row in results["rows"]:
        for who in (theirs(row["case"]), theirs(row["case"]) + COMPILED):
            if faster := _faster(row, who):
                name = f"{row['case']} {row['precision']} {row['pairs']}x{row['width']} vs {who}"
                found[name] = faster
    return found
