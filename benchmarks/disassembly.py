"""Read a compiled kernel: registers, spills, tensor-core instructions, and how many of its warps fit at once.

The tools that take NVIDIA's binaries apart come with Triton's wheel; AMD's compiler writes what it used into its
assembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton


class Multiprocessor(NamedTuple):
    """What the programs on one multiprocessor share."""

    registers: int  # per lane of a warp
    shared: int  # bytes of shared memory
    shared_lost: int  # bytes of it that each program loses
    tensor_memory: int  # columns
    warps: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(2048, 164 << 10, 1024, 0, 64),
    "sm_90": Multiprocessor(2048, 228 << 10, 1024, 0, 64),
    "sm_100": Multiprocessor(2048, 228 << 10, 1024, 512, 64),
    "gfx942": Multiprocessor(2048, 64 << 10, 0, 0, 32),
}
TENSOR_CORE = {
    "sm_80": r"\bHMMA",
    "sm_90": r"\bH(?:G)?MMA",
    "sm_100": r"\bUTC.?MMA|\bHMMA",
    "gfx942": r"\bv_mfma",
}


class Binary(NamedTuple):
    """What the compiler made of a kernel."""

    registers: int  # per thread
    spilled: int  # bytes per thread
    tensor_core: int  # instructions
    text: str  # listing


def read(arch: str, asm: Mapping[str, Any]) -> Binary:
    """Return what a compiled kernel uses; ``asm`` holds its ``cubin`` (NVIDIA) or ``amdgcn`` text."""
    if "cubin" in asm:
        registers, spilled, text = _disassemble(asm["cubin"])
    else:
        text = asm["amdgcn"]
        registers = int(_search(r"\.vgpr_count:\s+(\d+)", text))
        spilled = int(_search(r"\.private_segment_fixed_size:\s+(\d+)", text))
    return Binary(registers, spilled, len(re.findall(TENSOR_CORE[arch], text)), text)


def resident_warps(arch: str, registers: int, shared: int, tensor_memory: int, warps: int) -> int:
    """Return how many warps a multiprocessor holds at once of programs that need so much each."""
    limits = MULTIPROCESSORS[arch]
    programs = [limits.registers // (-(-registers // 8) * 8) // warps, limits.warps // warps]
    if shared:
        programs.append(limits.shared // (shared + limits.shared_lost))
    if tensor_memory:
        programs.append(limits.tensor_memory // tensor_memory)
    return min(programs) * warps


def _search(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the disassembly has no {pattern!r}: has the tool's output changed?")
    return match[1]


def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Return registers per thread, stack bytes per thread, and the instructions of an NVIDIA binary."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = run(str(tools / "cuobjdump"), "-res-usage", file.name)
        text = run(str(tools / "nvdisasm"), "-c", file.name)
    spilled = int(_search(r"STACK:(\d+)", usage)) or 4 * len(re.findall(r"\b(?:LDL|STL)\b", text))
    return int(_search(r"REG:(\d+)", usage)), spilled, text
