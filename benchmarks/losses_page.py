"""Tables, README rows and pictures of the benchmark of the loss, and the time ratios that are checked."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import plots
from benchmarks.competitors import (
    CASES,
    COMPILED,
    DISTINCT,
    HALF,
    PACKAGES,
    PUBLISHED,
    SIGLIP,
    Size,
    baseline,
    size_of,
)  # fmt: skip
from benchmarks.harness import Highlight, table
from benchmarks.measure import TOTAL, Timing

PICTURES = {
    "batch-size": "Line charts: time and extra memory of the loss against the batch size, for TRACER, the "
    "published formulation, the same compiled, and open_clip.",
    "forward-and-backward": "Bar charts: forward and backward time of the loss, for TRACER and its competitors.",
}


def _timing(entry: dict[str, Any], phase: str = TOTAL) -> Timing:
    return Timing(**entry["time"][phase])


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


def _ours(row: dict[str, Any]) -> str:
    """Return the row's first competitor: the implementation that TRACER chooses by itself on its machine."""
    return next(iter(row["competitors"]))


def _time_ratio(row: dict[str, Any], name: str) -> float | None:
    """Return a competitor's time divided by TRACER's."""
    ours, other = row["competitors"][_ours(row)], row["competitors"].get(name, {})
    if "time" not in ours or "time" not in other:
        return None
    return _timing(other).median / _timing(ours).median


def _main_table(rows: list[dict[str, Any]]) -> str:
    """Write all competitors of one case at the main size."""
    lines = []
    for row in rows:
        for name, entry in row["competitors"].items():
            begin = [row["precision"], name]
            if "time" not in entry:
                lines.append([*begin, entry["note"], "", "", "", "", ""])
                continue
            ratio = _time_ratio(row, name)
            lines.append(
                [
                    *begin,
                    *(str(_timing(entry, phase)) for phase in (TOTAL, "forward", "backward")),
                    f"{ratio:.2f}×" if ratio and name != _ours(row) else "",
                    _mebibytes(entry["memory"]) if "memory" in entry else "",
                    f"{entry['compile']:.1f} s" if "compile" in entry else "",
                ]
            )
    header = ["precision", "implementation", "forward + backward", "forward", "backward"]
    return table([*header, "time / ours", "extra memory", "compiling"], lines)


def _size_cells(row: dict[str, Any]) -> list[str]:
    return [CASES[row["case"]], row["precision"], str(row["width"]), str(row["pairs"])]


SIZE_HEADER = ["loss", "precision", "D", "N"]


def _sweep_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in sorted(
        rows, key=lambda r: (list(CASES).index(r["case"]), r["precision"], r["width"], r["pairs"])
    ):
        ours = row["competitors"][_ours(row)]
        others = []
        for name, entry in row["competitors"].items():
            if name != _ours(row):
                value = (
                    f"{_timing(entry)}, {_time_ratio(row, name):.2f}×" if "time" in entry else entry["note"]
                )
                others.append(f"{name}: {value}")
        lines.append([*_size_cells(row), str(_timing(ours)), "; ".join(others)])
    return table([*SIZE_HEADER, "ours", "others, and their time / ours"], lines)


def _replay_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            *_size_cells(row),
            name,
            str(_timing(entry)),
            *(str(Timing(**entry["replay"][phase])) for phase in (TOTAL, "forward", "backward")),
        ]
        for row in rows
        for name, entry in row["competitors"].items()
        if "replay" in entry
    ]
    header = [
        *SIZE_HEADER,
        "implementation",
        "as called",
        "replayed: forward + backward",
        "forward",
        "backward",
    ]
    return table(header, lines) if lines else ""


def traffic(size: Size, device: str) -> int:
    """Return the bytes that must move between memory and chip even if caches had no limit.

    These are features in, gradients out, and on a GPU the strips of gradient rows, which are written and then
    read by two products.
    """
    width = torch.finfo(HALF.get(size.precision, torch.float32)).bits // 8
    full = size.case == "full"
    features = (4 if full else 2) * size.pairs * size.width * width
    strips = 3 * (3 if full else 1) * size.pairs**2 * width if device == "cuda" else 0
    return 2 * features + 2 * size.pairs * size.width * width + strips


def _share_table(rows: list[dict[str, Any]], rates: dict[str, Any], device: str) -> str:
    """Write which share of the machine's measured rates TRACER reaches."""
    lines = []
    for row in rows:
        entry = row["competitors"][_ours(row)]
        size = size_of(row)
        seconds = Timing(**entry.get("replay", entry["time"])[TOTAL]).median
        operations, moved = 2 * size.work / seconds, traffic(size, device) / seconds
        lines.append(
            [
                *_size_cells(row),
                f"{operations / 1e12:.3g}", f"{operations / rates['matrix'][size.precision]:.0%}",
                f"{moved / 1e9:.3g}", f"{moved / rates['copy']:.1%}",
            ]
        )  # fmt: skip
    return table([*SIZE_HEADER, "TFLOP/s", "of the matrix rate", "GB/s", "of the copy rate"], lines)


def report(results: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    rows = results["rows"]
    parts = [section for case in CASES for section in _main_sections(case, rows)]
    if others := [row for row in rows if not row["main"]]:
        parts.append(
            f"### Other sizes\n\nBatches of more than {DISTINCT} pairs repeat the same {DISTINCT} pairs, and the "
            f"expected loss and gradients follow from one copy.\n\n{_sweep_table(others)}"
        )
    if results["left_out"]:
        parts.append("Left out, because the time budget was used up:\n\n" + _left_out(results["left_out"]))
    if results["growth"]:
        parts.append(
            f"### Extra memory as the batch doubles, D {results['main']['width']}\n\n"
            f"{_growth_table(results['growth'])}"
        )
    parts.append(_share_section(results))
    if replayed := _replay_table(rows):
        parts.append(
            f"### Small batches as replayed graphs: the device's time without Python's\n\n{replayed}"
        )
    return "\n\n".join(parts)


def _main_sections(case: str, rows: list[dict[str, Any]]) -> list[str]:
    """Write the main table of a case and notes on its competitors; returns nothing for a case that was not run."""
    chosen = [row for row in rows if row["case"] == case and row["main"]]
    if not chosen:
        return []
    sizes = ", ".join(sorted({f"N {row['pairs']}, D {row['width']}" for row in chosen}))
    sections = [f"### {CASES[case][0].upper() + CASES[case][1:]}, {sizes}\n\n{_main_table(chosen)}"]
    if any(SIGLIP in row["competitors"] for row in chosen):
        sections.append(
            "SigLIP takes a sigmoid of each pair instead of a softmax. It is another objective, with one matrix "
            "product less in the forward pass, and is checked against its own definition. It computes one chunk "
            "of the logits per rank, so a single process has one chunk."
        )
    if any("time" in row["competitors"].get(name, {}) for row in chosen for name in PACKAGES):
        sections.append(
            "The kernels of other packages multiply float32 features in TF32. Inf-CL converts to float32 in the "
            "rows of every precision, and memeff gives no gradient of the scale."
        )
    return sections


def _growth_table(points: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for point in points for name in point["memory"]))
    lines = [
        [
            CASES[point["case"]],
            point["precision"],
            str(point["pairs"]),
            *(_mebibytes(point["memory"][name]) if name in point["memory"] else "" for name in names),
        ]
        for point in points
    ]
    return table(["loss", "precision", "N", *names], lines)


def _share_section(results: dict[str, Any]) -> str:
    rates, device = results["rates"], results["device"]
    reached = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in rates["matrix"].items())
    rows = [row for row in results["rows"] if row["main"] or device == "cuda"]
    return (
        "### Share of what the machine can do\n\n"
        f"On this machine a large matrix product reaches {reached}; a large copy reaches "
        f"{rates['copy'] / 1e9:.3g} GB/s, read and written. The table compares TRACER with these rates. It counts "
        "the products that the algorithm needs (4 forward and 8 backward for the whole objective, 1 and 3 "
        "otherwise) and the bytes that would have to move even if caches had no limit.\n\n"
        + _share_table(rows, rates, device)
    )


def _left_out(sizes: list[dict[str, Any]]) -> str:
    grouped: dict[str, list[str]] = {}
    for size in sizes:
        key = f"{CASES[size['case']]}, {size['precision']}, D {size['width']}"
        grouped.setdefault(key, []).append(f"{size['pairs']} (about {size['seconds']:.0f} s)")
    return "\n".join(f"* {key}: N {', '.join(listed)}" for key, listed in grouped.items())


def _main_row(results: dict[str, Any], case: str, precision: str) -> dict[str, Any] | None:
    rows = (r for r in results["rows"] if r["main"] and (r["case"], r["precision"]) == (case, precision))
    return next(rows, None)


def highlights(results: dict[str, Any]) -> list[Highlight]:
    """Return the rows of the whole objective and of the CLIP loss at the main size."""
    shown = []
    for case, precision in (("full", "fp32"), ("full", "bf16"), ("clip", "fp32"), ("clip", "bf16")):
        row = _main_row(results, case, precision)
        other = baseline(case)
        ratio = row and _time_ratio(row, other)
        if not row or not ratio:
            continue
        entries = row["competitors"]
        named = "published formulation" if other == PUBLISHED else other
        loss = "whole TRACER objective" if case == "full" else CASES[case]
        what = f"{loss}, forward and backward, {row['pairs']} pairs of width {row['width']}, {precision}"
        compared = f"{named}: {_time_and_memory(entries[other])}"
        shown.append(Highlight(what, _time_and_memory(entries[_ours(row)]), compared, f"{ratio:.1f}×"))
    return shown


def _time_and_memory(entry: dict[str, Any]) -> str:
    memory = f", {_mebibytes(entry['memory'])}" if "memory" in entry else ""
    return f"{1e3 * _timing(entry).median:.4g} ms{memory}"


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    """Draw time and memory against the batch size, and forward and backward at the main size."""
    cases = [case for case in ("full", "clip") if any(row["case"] == case for row in results["rows"])]
    panels = [_time_panel(results, case) for case in cases]
    panels += [panel for case in cases if (panel := _memory_panel(results, case)).lines]
    bars = {}
    for case in cases:
        for precision in dict.fromkeys(row["precision"] for row in results["rows"]):
            if row := _main_row(results, case, precision):
                bars[f"{CASES[case]}, {precision}"] = {
                    name: [_timing(entry, phase).median for phase in ("forward", "backward")]
                    for name, entry in row["competitors"].items()
                    if "time" in entry
                }
    return {"batch-size": plots.curves(panels, "pairs N"), "forward-and-backward": plots.bars(bars)}


Line = list[tuple[float, float, float, float]]


def _time_panel(results: dict[str, Any], case: str) -> plots.Panel:
    """Return the curves of time of a case, in the first precision and at the main tables' width."""
    precision, width = results["rows"][0]["precision"], results["main"]["width"]
    lines: dict[str, Line] = {}
    for row in sorted(results["rows"], key=lambda r: r["pairs"]):
        if (row["case"], row["precision"], row["width"]) == (case, precision, width):
            for name, entry in row["competitors"].items():
                if "time" in entry and name in (
                    _ours(row),
                    baseline(case),
                    baseline(case) + COMPILED,
                    *PACKAGES,
                ):
                    t = _timing(entry)
                    lines.setdefault(name, []).append((row["pairs"], t.median, t.low, t.high))
    title = f"{CASES[case]}, {precision}, D {width}"
    return plots.Panel(title, "forward + backward", lines, plots.seconds)


def _memory_panel(results: dict[str, Any], case: str) -> plots.Panel:
    """Return the curves of extra memory of a case."""
    lines: dict[str, Line] = {}
    for point in results["growth"]:
        if point["case"] == case:
            for name, count in point["memory"].items():
                lines.setdefault(name, []).append((point["pairs"], count, count, count))
    return plots.Panel("", "extra memory", lines, plots.mebibytes)


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Return the baseline's time, plain and compiled, divided by TRACER's at every size."""
    by_name = {}
    for row in results["rows"]:
        for other in (baseline(row["case"]), baseline(row["case"]) + COMPILED):
            if ratio := _time_ratio(row, other):
                by_name[f"{row['case']} {row['precision']} {row['pairs']}x{row['width']} vs {other}"] = ratio
    return by_name
