"""What a program executes while it visits one tile, counted in machine code.

A kernel walks over its tiles in a loop, and within it over the blocks of D. Both loops are found by their
products: the loop over D is the innermost one that multiplies, the visit is the next one around it. The counts of
the loop over D are taken as often as it runs. A branch within a visit counts as if nothing were skipped, and
masked lanes as if they were not, so that these are the counts of a whole tile inside the matrix.

Bytes of shared memory are what its ports carry: operands of tensor cores that are read from it, loads, stores and
copies into it. Bytes of the second-level cache are all loads and stores of global memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

from benchmarks.disassembly import TENSOR_CORE
from tracer.kernels._tiles import Tile

_COPY = "LDGSTS"  # asynchronous, from global into shared memory
_OPERAND_ROW = 32  # bytes of an operand's row that an asynchronous tensor-core instruction multiplies
_NVIDIA = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_AMD = re.compile(r"^\s+([a-z]\w+)\b([^;]*)")
_LABEL = re.compile(r"^\s*(\.L\w+):")
_TARGET = re.compile(r"(\.L\w+)")
_WORDS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}
_AMD_WORDS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "b16": 2}
_AMD_WORDS |= {"b128": 16, "b96": 12, "b64": 8, "b32": 4, "u16": 2, "d16": 2, "ubyte": 1, "u8": 1, "b8": 1}


def lanes(arch: str) -> int:
    """Return the lanes of a warp."""
    return 64 if arch.startswith("gfx") else 32


class Visit(NamedTuple):
    """What is executed: instructions of one warp, barriers and bytes of the whole program.

    On gfx942 the instructions are those of the vector units, which alone are scarce there; among them is any
    exchange between lanes that does not pass through the local memory.
    """

    instructions: int
    shuffles: int
    barriers: int
    exponentials: int
    cache_bytes: int  # of the second-level cache
    shared_bytes: int
    multiply_adds: int  # of tensor cores; more than the tile's where warps repeat one another's products

    def plus(self, other: Visit, times: Fraction | int = 1) -> Visit:
        """Return the sum of this and ``times`` the other, in whole numbers."""
        return Visit(*(round(a + times * b) for a, b in zip(self, other, strict=True)))


class _Instruction(NamedTuple):
    opcode: str
    operands: str


class _Loop(NamedTuple):
    """The instructions of a loop, from the target of its jump back to the jump."""

    first: int
    last: int

    def contains(self, i: int) -> bool:
        return self.first <= i <= self.last

    @property
    def length(self) -> int:
        return self.last - self.first

    @property
    def indices(self) -> range:
        return range(self.first, self.last + 1)


def count(arch: str, text: str, tile: Tile, warps: int, width: int) -> tuple[Visit, Visit] | None:
    """Return what a visit executes for features of ``width``, and what one step of the loop over D adds.

    Args:
        arch: architecture.
        text: the listing of a kernel.
        tile: of the kernel.
        warps: of a program.
        width: D.

    Returns:
        None for a kernel that has no loop over D.
    """
    instructions, jumps = _parsed(text)
    pattern = re.compile(TENSOR_CORE[arch])
    if not any(pattern.match(x.opcode) for x in instructions):
        pattern = re.compile(r"FFMA|v_(?:pk_)?fma")
    products = [i for i, x in enumerate(instructions) if pattern.match(x.opcode)]
    loops = _loops(jumps)
    inner = _multiplying(loops, products)
    if inner is None:
        return None
    larger = [loop for loop in loops if loop.first < inner.first and loop.contains(inner.last)]
    if not larger:
        return None
    outer = min(larger, key=lambda loop: loop.length)

    def total(indices: Iterable[int], opcode: str = "") -> Visit:
        chosen = [instructions[i] for i in indices if instructions[i].opcode.startswith(opcode)]
        return _sum(arch, chosen, tile, warps)

    ahead, behind = range(outer.first, inner.first), range(inner.last + 1, outer.last + 1)
    one_pass, copied = total(inner.indices), total(inner.indices, _COPY)
    unrolled = _unrolled(total(ahead), total(ahead, _COPY), one_pass, copied, tile.num_stages)
    executed = [*ahead, *_taken(behind, instructions, jumps)]
    around, copies = total(executed), total(executed, _COPY)
    # A product that the compiler has taken out of the loop is one that the loop has not to take.
    taken_out = unrolled * around.multiply_adds // one_pass.multiply_adds if one_pass.multiply_adds else 0
    # Each block is copied once: the loop's last passes mask out as many copies as stand ahead of it.
    share = Fraction(taken_out, unrolled)
    around = around._replace(
        cache_bytes=around.cache_bytes - copies.cache_bytes + int(share * copied.cache_bytes),
        shared_bytes=around.shared_bytes - copies.shared_bytes + int(share * copied.shared_bytes),
    )
    passes = Fraction(-(-width // tile.block_d) - taken_out, unrolled)
    return around.plus(one_pass, passes), _sum(arch, [], tile, warps).plus(one_pass, Fraction(1, unrolled))


def _unrolled(ahead: Visit, copied_ahead: Visit, one_pass: Visit, copied: Visit, stages: int) -> int:
    """Return how many blocks of D a pass of the loop over D multiplies; the compiler unrolls some loops.

    Ahead of the loop stand the copies of one block fewer than the pipeline has stages, and those of blocks that
    are multiplied there.
    """
    if not (copied.cache_bytes and one_pass.multiply_adds):
        return 1
    waiting = Fraction(copied_ahead.cache_bytes, copied.cache_bytes)
    waiting -= Fraction(ahead.multiply_adds, one_pass.multiply_adds)
    return max(1, round((stages - 1) / waiting)) if waiting > 0 else 1


def _taken(behind: range, instructions: list[_Instruction], jumps: dict[int, int]) -> list[int]:
    """Return the indices ``behind`` the loop over D that each visit executes.

    A whole program jumps together over code with a barrier in it: over the blocks that an unrolled loop leaves
    over, of which there are none, and over the positives without labels, which lie in tiles on the diagonal alone.
    """
    barriers = [i for i in behind if _is_barrier(instructions[i].opcode)]
    left_out = {
        i
        for first, target in jumps.items()
        if first in behind and target - 1 in behind and any(first < barrier < target for barrier in barriers)
        for i in range(first + 1, target)
    }
    return [i for i in behind if i not in left_out]


def _parsed(text: str) -> tuple[list[_Instruction], dict[int, int]]:
    """Return the instructions of a listing, and where those that jump may go on, by index."""
    instructions: list[_Instruction] = []
    labels: dict[str, int] = {}
    targets: dict[int, str] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _NVIDIA.match(line) or _AMD.match(line):
            opcode, operands = match[1], match[2]
            target = _TARGET.search(operands) if opcode.startswith(("BRA", "s_branch", "s_cbranch")) else None
            if target:
                targets[len(instructions)] = target[1]
            instructions.append(_Instruction(opcode, operands))
    return instructions, {i: labels[label] for i, label in targets.items() if label in labels}


def _loops(jumps: dict[int, int]) -> list[_Loop]:
    """Return the loops: of those with the same first instruction the one that ends last."""
    ends = {target: i for i, target in sorted(jumps.items()) if target <= i}
    return [_Loop(first, last) for first, last in ends.items()]


def _multiplying(loops: list[_Loop], products: list[int]) -> _Loop | None:
    """Return the loop over D: of the innermost loops that multiply the one with most products."""
    numbers = {loop: sum(map(loop.contains, products)) for loop in loops}
    multiplying = [loop for loop in loops if numbers[loop]]
    innermost = [
        loop
        for loop in multiplying
        if not any(loop.contains(x.first) and loop.contains(x.last) for x in multiplying if x is not loop)
    ]
    return max(innermost, key=lambda loop: numbers[loop], default=None)


def _sum(arch: str, instructions: list[_Instruction], tile: Tile, warps: int) -> Visit:
    total = Visit(*(0,) * len(Visit._fields))
    for instruction in instructions:
        total = total.plus(Visit(*_of_one(arch, instruction, tile, warps)))
    return total


def _of_one(arch: str, x: _Instruction, tile: Tile, warps: int) -> Iterator[int]:
    """Yield what one instruction of each warp counts as, in the order of :class:`Visit`."""
    threads, amd = warps * lanes(arch), arch.startswith("gfx")
    read, multiplied = _product(arch, x, tile, warps)
    yield int(not amd or (x.opcode.startswith("v_") and not x.opcode.startswith("v_mfma")))
    yield int(bool(re.match(r"SHFL|REDUX|ds_bpermute|ds_swizzle", x.opcode)))
    yield int(_is_barrier(x.opcode))
    yield int(bool(re.match(r"MUFU\.EX2|v_exp_f32", x.opcode)))
    yield threads * (_word(x.opcode) if _is_global(x.opcode) else 0)
    yield threads * _shared_word(x.opcode) + read
    yield multiplied


def _is_barrier(opcode: str) -> bool:
    return bool(re.match(r"BAR\.|s_barrier", opcode))


def _is_global(opcode: str) -> bool:
    return bool(re.match(r"(?:LDG|STG|LDGSTS)\b|(?:global|buffer|flat)_(?:load|store)", opcode))


def _shared_word(opcode: str) -> int:
    """Return the bytes that a lane reads from shared memory or writes to it."""
    if match := re.match(r"(?:LDSM|STSM)\.\S*?\.?([124])?$", opcode):
        return 4 * int(match[1] or 1)  # matrices of 8×8 numbers of 16 bits, 128 bytes each
    if re.match(r"(?:LDS|STS|LDGSTS)\b", opcode):
        return _word(opcode)
    if match := re.match(r"ds_(?:read|write)(2)?", opcode):
        return _word(opcode) * int(match[1] or 1)
    return 0


def _word(opcode: str) -> int:
    """Return the bytes of a lane's load or store."""
    parts, words = (opcode.split("_"), _AMD_WORDS) if opcode.islower() else (opcode.split("."), _WORDS)
    return next((words[part] for part in reversed(parts) if part in words), 4)


def _product(arch: str, x: _Instruction, tile: Tile, warps: int) -> tuple[int, int]:
    """Return the bytes of shared memory that a tensor-core instruction reads, and its multiply-adds.

    Both are of the whole program. Warps of sm_90 multiply in groups of four; on sm_100 one thread starts the
    product of a whole tile, whose size is not part of the instruction.
    """
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", x.opcode):
        m, n, k = map(int, match.groups())
        left = m if re.match(r"\s*R\w+, gdesc", x.operands) else 0
        return warps // 4 * (left + n) * _OPERAND_ROW, warps // 4 * m * n * k
    if re.match(r"UTC\w?MMA", x.opcode):
        n, m = tile.block_n, tile.block_m
        deep = 8 if "TF32" in x.opcode else 16
        left = 0 if re.match(r"\s*tmem", x.operands) else n
        return (left + m) * _OPERAND_ROW, n * m * deep
    if match := re.match(r"HMMA\.16(8)(\d+)", x.opcode):
        return 0, warps * 16 * int(match[1]) * int(match[2])
    if match := re.match(r"v_mfma_f32_(\d+)x(\d+)x(\d+)", x.opcode):
        m, n, k = map(int, match.groups())
        return 0, warps * m * n * k
    return 0, 0
