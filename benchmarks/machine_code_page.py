"""Tables of the benchmark of machine code: the worst of each kind, every configuration, roofline estimates."""

from __future__ import annotations

from typing import Any

from benchmarks import roofline
from benchmarks.harness import Highlight, table
from benchmarks.visits import Visit
from benchmarks.work import ARCHITECTURES

AVERAGE = "moving average"


def report(results: dict[str, Any]) -> str:
    """Return the tables as Markdown: the worst of each kind, and roofline estimates."""
    parts = [
        f"Compiled with Triton {results['triton']}, not run. The worst of each kind of kernel; registers are per "
        "thread, spilled bytes are registers that went to memory, resident warps are what a multiprocessor holds:",
        _summary(results["kernels"]),
        "Compiled variants of a run whose sizes, margin, smoothing, scales and temperature change: "
        + ", ".join(f"{count} of `{name}`" for name, count in results["variants"].items())
        + ".",
        "### What the visit of a tile executes",
        "Counted in the machine code that large batches in 16 bits take, D 512: instructions, shuffles and "
        "exponentials of a warp (on gfx942 of the vector units), barriers and bytes of the program. Shared memory "
        "carries the operands of the tensor cores too. The clocks are a multiprocessor's least by data sheet, "
        "an estimate; a shuffle counts as four bytes of shared memory for each lane, barriers cost nothing:",
        roofline.visits_table(results["kernels"]),
        "### Roofline: estimate, not measured",
        "The least time by data sheet that bfloat16 inputs allow, and what sets it: counted products on tensor "
        "cores, counted elementwise operations and exponentials, bytes of memory, or of a visit the instructions, "
        "the shared memory or the second-level cache. In brackets: if every visit "
        "of a tile read its operands from memory; otherwise caches keep them within a launch. Perfect overlap, "
        "no cost of launches. Products: the matrix products that finish the backward pass.",
        _estimates(results["estimates"]),
        f"Moving average, {roofline.AVERAGE_BYTES} bytes per parameter at the memory's bandwidth: estimate, not "
        "measured.",
        _average_estimates(results["average_estimates"]),
    ]
    if results["full_table"]:
        parts += ["### Every configuration", every(results["kernels"])]
    return "\n\n".join(parts)


def _kind(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return the row of the summary that a kernel belongs to: architecture, kernel, operands."""
    name, operands = row["kernel"], "16 bits"
    if name == AVERAGE or name.startswith(("combine", "merge")):
        name, operands = name.split(" of ")[0], ""
    elif row["bits"] == 16:
        name += f", {row['products']} product{'' if row['products'] == 'one' else 's'}"
    else:
        name, operands = "all of these", "float32, TF32" if row["bits"] == 19 else "float32, exact"
    return row["architecture"], name, operands


def _summary(rows: list[dict[str, Any]]) -> str:
    kinds: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(_kind(row), []).append(row)
    header = ["architecture", "kernel", "operands", "configurations", "most registers", "spilled bytes"]
    header += ["most shared KiB", "fewest tensor-core instructions", "fewest resident warps"]
    lines = []
    for kind, same in sorted(
        kinds.items(), key=lambda item: (ARCHITECTURES.index(item[0][0]), item[0][2] != "16 bits")
    ):
        most = {name: max(row[name] for row in same) for name in ("registers", "spilled", "shared")}
        fewest = {name: min(row[name] for row in same) for name in ("tensor_core", "resident_warps")}
        lines.append(
            [
                *kind,
                str(len(same)),
                str(most["registers"]),
                str(most["spilled"]),
                f"{most['shared'] / 1024:.0f}",
                str(fewest["tensor_core"]),
                str(fewest["resident_warps"]),
            ]
        )
    return table(header, lines)


def every(rows: list[dict[str, Any]]) -> str:
    header = ["architecture", "kernel", "products", "bits", "options", "D", "tile", "warps", "stages"]
    header += ["registers", "spilled bytes", "shared KiB", "tensor-core instructions", "resident warps"]
    of_a_visit = Visit._fields[:-1]
    header += [f"{name.replace('_', ' ')} of a visit" for name in of_a_visit]
    return table(
        header,
        [
            [
                row["architecture"],
                row["kernel"],
                row["products"],
                str(row["bits"]),
                row["options"],
                str(row["width"] or "any"),
                "×".join(map(str, row["tile"])),
                str(row["warps"]),
                str(row["stages"]),
                str(row["registers"]),
                str(row["spilled"]),
                f"{row['shared'] / 1024:.0f}",
                str(row["tensor_core"]),
                str(row["resident_warps"]),
                *(str(row["visit"][name]) if row.get("visit") else "" for name in of_a_visit),
            ]
            for row in rows
        ],
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _estimates(rows: list[dict[str, Any]]) -> str:
    header = ["estimate for", "objective", "N", "D", "forward ms", "backward ms", "products ms", "sum ms"]
    lines = []
    for row in rows:
        seconds, bound = row["estimate_seconds"], row["estimate_bound_by"]
        uncached = row["estimate_seconds_if_nothing_were_cached"]
        cells = [
            f"{_milliseconds(seconds[when])}, {bound[when]}"
            + (f" ({_milliseconds(uncached[when])})" if when in uncached else "")
            for when in seconds
        ]
        where = f"{row['card']} ({row['architecture']})"
        sum_ = _milliseconds(sum(seconds.values()))
        lines.append([where, row["objective"], str(row["rows"]), str(row["width"]), *cells, sum_])
    return table(header, lines)


def _average_estimates(rows: list[dict[str, Any]]) -> str:
    models = list(dict.fromkeys(row["model"] for row in rows))
    cards: dict[str, list[str]] = {}
    for row in rows:
        where = f"{row['card']} ({row['architecture']})"
        cards.setdefault(where, [where]).append(_milliseconds(row["estimate_seconds"]))
    return table(["estimate for", *(f"{model}, ms" for model in models)], list(cards.values()))


def highlights(results: dict[str, Any]) -> list[Highlight]:
    """Return the number of spilled bytes over all kernels."""
    rows = results["kernels"]
    architectures = sorted({row["architecture"] for row in rows})
    what = f"registers spilled by {len(rows)} compiled kernels ({', '.join(architectures)})"
    return [Highlight(what, f"{sum(row['spilled'] for row in rows)} bytes", "", "")]


def exact(results: dict[str, Any]) -> dict[str, float]:
    """Return registers, spills, shared memory and visits: a compiler of one version repeats them."""
    numbers: dict[str, float] = {}
    for row in results["kernels"]:
        name = (
            f"machine code {row['architecture']} {row['kernel']}, {row['products']}, {row['bits']} bits, "
            f"{'x'.join(map(str, row['tile']))}, {row['warps']} warps, {row['stages']} stages, "
            f"options {row['options']}, D {row['width']}:"
        )
        for what in ("registers", "spilled", "shared"):
            numbers[f"{name} {what}"] = row[what]
        for what, number in (row.get("visit") or {}).items():
            numbers[f"{name} {what.replace('_', ' ')} of a visit"] = number
    return numbers | {f"compiled variants of {name}": count for name, count in results["variants"].items()}
