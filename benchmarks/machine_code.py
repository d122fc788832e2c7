"""Compile every shipped configuration of the loss kernels ahead of time and look at the machine code.

    python -m benchmarks.machine_code [--quick] [--json] [--arch sm_90 ...]

No GPU is needed: the launchers of ``kernels/contrastive.py`` run on ``meta`` tensors, which hold no data, and
their launches are compiled for the named architecture instead of being started, so what is examined is what
would run. Per kernel: registers per thread, bytes spilled to memory (must be 0), shared memory, tensor-core
instructions, and how many warps of it a multiprocessor holds at once by registers and shared memory.

``--quick`` leaves out the variants with fewer options and those whose width is no multiple of a block, compiles
the combine kernel once per architecture, kind and number of products, and float32 products, exact or in TF32,
only where their tile is not one that the same kernel has in sm_90's column. ``--variants`` prints how
many compiled variants of each kernel a run needs whose sizes, margin, smoothing, scales and temperature
change. AMD's scalar registers may be parked in lanes of vector registers; that is no memory traffic and not
counted as a spill.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tracer.kernels import _config, contrastive
from tracer.kernels._config import Tile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Registers of a multiprocessor per lane of a warp, shared memory in bytes, most warps, warps per scheduler.
LIMITS = {
    "sm_80": (2048, 164 << 10, 64),
    "sm_90": (2048, 228 << 10, 64),
    "sm_100": (2048, 228 << 10, 64),
    "gfx942": (2048, 64 << 10, 32),
}
TENSOR_CORE = {
    "sm_80": r"\bHMMA",
    "sm_90": r"\bH(?:G)?MMA",
    "sm_100": r"\bUTC.?MMA|\bHMMA",
    "gfx942": r"\bv_mfma",
}
loss: Any = contrastive  # called with unpacked arguments, which the type checker can't count
FULL, CLIP = (True,) * 4, (True, False, False, False)


@dataclass(frozen=True)
class Case:
    """One kernel as shipped: what its table entry says, and which options it is compiled with."""

    arch: str
    kernel: str
    many: bool  # more than one product per tile
    bits: int  # of an operand: 16, TF32's 19, or 32
    tile: Tile
    options: bool  # labels, margin and smoothing
    width: int = 512  # D


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case; ``name`` is the kernel's, which for ``forward`` may be the combine."""

    case: Case
    name: str
    registers: int
    spilled: int
    shared: int
    tensor_core: int
    resident_warps: int


class _Driver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling(arch: str, precision: str = "ieee", skip: Any = None) -> Iterator[list[tuple[Any, Any]]]:
    """Within, the loss's launchers compile for ``arch``, except the kernel to ``skip``; yields the list of
    (kernel, compiled kernel).
    """
    compiled: list[tuple[Any, Any]] = []

    def launch(kernel: Any, grid: Any, args: Any, tile: Tile, **constants: Any) -> None:
        if kernel is skip:
            return
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        compiled.append((kernel, kernel.run(*args, grid=grid, warmup=True, **constants, **options)))

    matmul = torch.backends.cuda.matmul
    kept = contrastive._launch, contrastive.require_device, driver._active, matmul.fp32_precision
    contrastive._launch, contrastive.require_device = launch, lambda tensor: None
    matmul.fp32_precision = precision
    driver.set_active(_Driver(TARGETS[arch]))  # type: ignore[arg-type]
    try:
        yield compiled
    finally:
        contrastive._launch, contrastive.require_device = kept[:2]
        driver._active, matmul.fp32_precision = kept[2:]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _arguments(case: Case, N: int = 1024) -> Any:
    feature = _empty(N, case.width, dtype=torch.bfloat16 if case.bits == 16 else torch.float32)
    y = _empty(N, dtype=torch.int64) if case.options else None
    teacher = (feature, feature, _empty()) if case.many else (None, None, None)
    return feature, feature, _empty(), y, y, *teacher


def compile_case(case: Case, combine: bool = True) -> list[Report]:
    """Compile one case, of the forward kinds with the combine kernel or without, and read the machine code."""
    margin = smoothing = 0.05 if case.options else 0.0
    enabled = FULL if case.many else CLIP
    arguments = _arguments(case)
    skip = None if combine else contrastive._combine_kernel
    with compiling(case.arch, "tf32" if case.bits == 19 else "ieee", skip) as compiled:
        if case.kernel == "backward":
            stats = _empty(contrastive.STAT_ROWS, 1024)
            needs = (True, True, True)
            loss.backward(
                _empty(4), *arguments, stats, stats, margin, smoothing, enabled, needs, tile=case.tile
            )
        else:
            stats_on = case.kernel == "forward with stats"
            loss.forward(*arguments, margin, smoothing, enabled, stats_on, tile=case.tile)
    return [_read(case, kernel.__name__, code) for kernel, code in compiled[:2]]


def _read(case: Case, name: str, code: Any) -> Report:
    if "cubin" in code.asm:
        registers, spilled, text = _disassemble(code.asm["cubin"])
        per_lane = -(-registers // 8) * 8
    else:
        text = code.asm["amdgcn"]
        registers = int(_find(r"\.vgpr_count:\s+(\d+)", text))
        spilled = int(_find(r"\.private_segment_fixed_size:\s+(\d+)", text))
        per_lane = -(-registers // 8) * 8
    shared = int(code.metadata.shared)
    lanes, memory, most = LIMITS[case.arch]
    warps = int(code.metadata.num_warps)
    by_registers = lanes // per_lane // warps
    by_memory = memory // (shared + 1024) if shared else by_registers
    resident = min(by_registers, max(by_memory, 1), most // warps) * warps
    count = len(re.findall(TENSOR_CORE[case.arch], text))
    return Report(case, name, registers, spilled, shared, count, resident)


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the disassembly has no {pattern!r}: has the tool's output changed?")
    return match[1]


def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers per thread, stack bytes per thread, and the instructions of an NVIDIA binary."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = run(str(tools / "cuobjdump"), "-res-usage", file.name)
        text = run(str(tools / "nvdisasm"), "-c", file.name)
    spilled = int(_find(r"STACK:(\d+)", usage)) or 4 * len(re.findall(r"\b(?:LDL|STL)\b", text))
    return int(_find(r"REG:(\d+)", usage)), spilled, text


def shipped(architectures: list[str], quick: bool) -> list[Case]:
    """Every entry of the tables of the named architectures: with all options and, unless quick, without, and
    with a width that no block divides.
    """
    variants = ((True, 512),) if quick else ((True, 512), (False, 512), (True, 520))
    cases = [
        Case(arch, kernel, many, bits, tile, options, width)
        for arch in architectures
        for (kernel, many, bits), tiles in _config.TABLES[arch].items()
        for tile in tiles
        for options, width in variants
    ]
    if not quick:
        return cases

    def known(case: Case) -> bool:
        """Whether sm_90 compiles the same in float32."""
        entry = _config.TABLES["sm_90"].get((case.kernel, case.many, case.bits), ())
        return case.bits != 16 and case.arch != "sm_90" and case.tile in entry

    return [case for case in cases if not known(case)]


def reports(architectures: list[str], quick: bool = False) -> list[Report]:
    """Compile in as many processes as there are processors; the slowest kinds first."""
    cases = sorted(shipped(architectures, quick), key=lambda c: (c.many, c.kernel == "forward with stats"))
    cases.reverse()
    seen: set[tuple[str, str, bool]] = set()
    combine = []
    for case in cases:  # what the combine kernel computes depends on these, beside the tile's sides
        key = case.arch, case.kernel, case.many
        combine.append(not quick or key not in seen)
        seen.add(key)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        return [report for found in pool.map(compile_case, cases, combine) for report in found]


def variants() -> dict[str, int]:
    """Compiled variants per kernel of a run with changing sizes, strips, margins, smoothings and scales."""
    tile = _config.TABLES["sm_90"]["forward", True, 16][-1]
    with compiling("sm_90") as compiled:
        for N, M in ((512, 512), (511, 512), (1, 1), (16, 48), (1000, 77)):
            for value in (0.01, 0.3, 1.0):
                feature = _empty(max(N, M), 64, dtype=torch.bfloat16)
                y = _empty(max(N, M) + 1, dtype=torch.int64)[1:]  # the alignment of labels varies too
                arguments = (
                    feature[:N],
                    feature[:M],
                    _empty(),
                    y[:N],
                    y[:M],
                    feature[:N],
                    feature[:M],
                    _empty(),
                )
                _, rows, cols, _ = loss.forward(*arguments, value, value, FULL, True, tile=tile)
                loss.backward(
                    _empty(4), *arguments, rows, cols, value, value, FULL, (True,) * 3,
                    tile=tile, strip_bytes=1 << 16,
                )  # fmt: skip
    kernels = {id(kernel): kernel for kernel, _ in compiled}.values()
    return {kernel.__name__: len(kernel.device_caches[str(TARGETS["sm_90"])][0]) for kernel in kernels}


def table(found: list[Report]) -> str:
    """The reports as a Markdown table."""
    lines = [
        "| architecture | kernel | products | bits | options | tile | warps | registers | spilled bytes "
        "| shared KiB | tensor-core instructions | resident warps |",
        "|" + "---|" * 12,
    ]
    for r in sorted(found, key=lambda r: (r.case.arch, r.name, str(r.case))):
        c = r.case
        tile = "×".join(map(str, c.tile[:3])) if r.name != "_combine_kernel" else "–"
        cells = [
            c.arch, c.kernel if tile != "–" else f"combine of {c.kernel}", "several" if c.many else "one", c.bits,
            "all" if c.options else "none", tile, c.tile.num_warps if tile != "–" else _config.COMBINE.num_warps,
            r.registers, r.spilled, f"{r.shared / 1024:.0f}", r.tensor_core, r.resident_warps,
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table; exit with an error if any kernel spills."""
    parser = argparse.ArgumentParser(description="Registers, spills and tensor-core use of the loss kernels.")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS), help="architectures")
    parser.add_argument("--quick", action="store_true", help="only the variants with all options")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--variants", action="store_true", help="count compiled variants of a varied run instead"
    )
    chosen = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: unset it, kernels can only be compiled or interpreted")
    if chosen.variants:
        print(json.dumps(variants()))
        return
    found = reports(chosen.arch, chosen.quick)
    print(json.dumps([asdict(r) for r in found]) if chosen.json else table(found))
    spilling = [r for r in found if r.spilled]
    if spilling:
        sys.exit(f"{len(spilling)} kernels spill: " + "; ".join(str(r) for r in spilling))


if __name__ == "__main__":
    main()
