"""Tables of the benchmark of other packages' kernels, its rows of the README's table, and its exact numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.harness import Highlight, table
from benchmarks.packages import INF_CL_ROWS, MEMEFF, PACKAGES, SIGLIP_KERNEL, inf_cl_work
from benchmarks.work import PASSES

OURS, OUR_SIGMOID = "TRACER", "TRACER, sigmoid"
LARGEST = (1024, 512)  # N and D of the largest size that is counted


def report(results: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    named = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    N, D = (results["memory"][0][name] for name in ("rows", "width"))
    by_formula = inf_cl_work(*LARGEST)._asdict()
    return "\n\n".join(
        [
            f"{named}. **Counted** in Triton's interpreter, float16, forward + backward, once loss and gradients "
            "agree with the definition. Inf-CL works in float32 whatever the features are. memeff gives no "
            "gradient of the scale; it takes five products where it makes each tower's gradient in a walk of "
            "its own, for D up to 512 on sm_100 and up to 1024 elsewhere, and above that four, adding all "
            "gradients with atomics. Both sigmoids make all gradients in the forward pass. The kernels' bytes "
            "leave out what torch's matrix products load again; torch's bytes hold each operand of an operation "
            "once.",
            _work_table(results["work"]),
            f"Inf-CL is counted at N {INF_CL_ROWS} alone: for N {LARGEST[0]}, half an hour of the interpreter is "
            "not enough. **By formula**, from the loops of its kernels, it takes "
            f"{_both(by_formula, 'units', '.2f')} products there, and its kernels move "
            f"{_both(by_formula, 'bytes', '.1f', 1e6)} MB. At N {INF_CL_ROWS} the formula gives what is counted, "
            "to the byte.",
            f"**Counted** bytes alive at once beyond the inputs, bfloat16, N {N}, D {D}, gradients included, "
            "beside one tower of features:",
            _memory_table(results["memory"]),
            f"**Compiled** with Triton {results['triton']}, not run; N 1024, D 512. A kernel with 0 resident "
            "warps cannot start on that architecture, because one program needs more shared memory than a "
            "multiprocessor has. Inf-CL's kernels hold an instruction of NVIDIA's and do not compile for gfx942.",
            _code_table(results["kernels"]),
            "**Published** by the packages, as they measured it, beside **estimates**: the least time by the "
            "data sheet that TRACER's form of the same loss needs with everything overlapped, and that the "
            "package's counted products alone need. A time that was measured cannot be divided by an estimate.",
            _estimate_table(results["estimates"]),
        ]
    )


def _both(row: Mapping[str, Any], what: str, form: str, unit: float = 1) -> str:
    return " + ".join(format(row[what][name] / unit, form) for name in PASSES)


def _work_table(rows: list[dict[str, Any]]) -> str:
    header = [
        "kernels of",
        "tiles of",
        "N",
        "D",
        "products",
        "sum",
        "MB of the kernels",
        "sum",
        "MB of torch",
    ]
    lines = [
        [
            row["who"],
            row["architecture"],
            str(row["rows"]),
            str(row["width"]),
            _both(row, "units", ".2f"),
            f"{sum(row['units'].values()):.2f}",
            _both(row, "bytes", ".1f", 1e6),
            f"{sum(row['bytes'].values()) / 1e6:.1f}",
            _both(row, "torch_bytes", ".1f", 1e6),
            _both(row, "atomics", ".0f"),
            _both(row, "launches", ".0f"),
        ]
        for row in rows
    ]
    return table([*header, "atomic additions", "launches"], lines)


def _memory_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        tower = 2 * row["rows"] * row["width"]
        cells = (f"{row[name] / 2**20:.1f} ({row[name] / tower:.1f} towers)" for name in PASSES)
        lines.append([row["who"], *cells])
    return table(["kernels of", "MiB forward", "MiB backward"], lines)


def _code_table(rows: list[dict[str, Any]]) -> str:
    header = ["architecture", "kernels of", "kernel", "bits", "warps", "stages", "registers", "spilled bytes"]
    header += ["shared KiB", "tensor-core instructions", "resident warps"]
    columns = ("architecture", "who", "kernel", "bits", "warps", "stages", "registers", "spilled")
    return table(
        header,
        [
            [
                *(str(row[name]) for name in columns),
                f"{row['shared'] / 1024:.0f}",
                str(row["tensor_core"]),
                str(row["resident_warps"]),
            ]
            for row in rows
        ],
    )


def _estimate_table(rows: list[dict[str, Any]]) -> str:
    header = ["package", "card", "N"]
    header += ["D", "published ms", "beside it", "estimated ms", "their products, estimated ms"]
    lines = []
    for row in rows:
        times = (row[name] for name in ("seconds", "estimate_ours", "estimate_their_products"))
        published_ms, *estimated = (f"{1e3 * seconds:.3g}" for seconds in times)
        known = (str(row[name]) for name in ("who", "card", "pairs", "width"))
        lines.append([*known, published_ms, row["ours"], *estimated])
    return table(header, lines)


def highlights(results: dict[str, Any]) -> list[Highlight]:
    """Return the products of both losses beside the packages', at the largest size counted."""
    largest = max(row["rows"] for row in results["work"])
    units = {row["who"]: sum(row["units"].values()) for row in results["work"] if row["rows"] == largest}
    return [
        Highlight(
            f"products of the {loss}, counted, N {largest}",
            f"{units[ours]:.2f} N²D",
            f"{units[package]:.2f} N²D ({PACKAGES[package].name} {results['versions'][PACKAGES[package].name]})",
            f"{units[package] / units[ours]:.2f}×",
        )
        for loss, ours, package in (("CLIP loss", OURS, MEMEFF), ("SigLIP loss", OUR_SIGMOID, SIGLIP_KERNEL))
    ]


def exact(results: dict[str, Any]) -> dict[str, float]:
    """Return every count, and registers, spills and shared memory of every kernel, by name."""
    numbers: dict[str, float] = {}
    for row in results["work"]:
        name = f"work {row['who']} {row['architecture']} {row['rows']}x{row['width']}"
        for what in ("units", "bytes", "torch_bytes", "atomics", "launches"):
            for when, value in row[what].items():
                numbers[f"{name} {what.replace('_', ' ')} {when}"] = value
    for row in results["memory"]:
        for when in PASSES:
            numbers[f"memory {row['who']} {row['rows']}x{row['width']} {when}"] = row[when]
    for row in results["kernels"]:
        order = sum(name.startswith(_code_name(row)) for name in numbers) // 3
        for what in ("registers", "spilled", "shared"):
            numbers[f"{_code_name(row)} {order}: {what}"] = row[what]
    return numbers


def _code_name(row: dict[str, Any]) -> str:
    columns = ("architecture", "who", "kernel", "bits", "warps", "stages")
    return "machine code " + ", ".join(str(row[name]) for name in columns)
