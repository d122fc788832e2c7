"""What the compilers of four architectures make of the kernels' order in memory; no GPU needed."""

from __future__ import annotations

import re

import pytest
from compiled_kernels import ARCHITECTURES, Code, compiled, lines_of
from planted import BARRIERS, BUGS, Bug

from tracer.kernels._tiles import TABLES

NARROW = Bug(
    "_triton_backward", "(cols // BLOCK_M) * BLOCK_M", "cols"
)  # where a tile starts is not known then
FORWARD = "_triton_forward.py", "forward_kernel"


def assert_ordered(code: Code) -> None:
    """Assert the order of a forward kernel: parked stores, a barrier, the merge's loads and stores, a barrier.

    Between threads of a program a barrier orders memory only if the stores stand before it, and only for loads
    that look into the memory that all threads share: not through NVIDIA's read-only path, not through AMD's
    scalar cache, and not from another compute unit. The four lie in a loop, which a compiler may list from any
    point on.
    """
    barriers = lines_of(*FORWARD, "tl.debug_barrier()")
    before, after = (_places(code, [lines], r"BAR|s_barrier") for lines in barriers)
    assert before, "no barrier between the parked statistics and their merge"
    assert after, "no barrier between the merge and the next parked statistics"
    start = after[-1] + 1
    code = code._replace(instructions=code.instructions[start:] + code.instructions[:start])

    before = _places(code, barriers[:1], r"BAR|s_barrier")
    parks = _places(code, lines_of(*FORWARD, "store_statistics(park_ptr"), r"ST|store")
    loads = _places(code, lines_of(*FORWARD, "= load_statistics("), r"LD|load")
    merged = _places(code, lines_of(*FORWARD, "store_statistics(col_partial_ptr"), r"ST|store")
    assert parks
    assert len(loads) == 2 * len(merged) > 0
    assert max(parks) < min(before) <= max(before) < min(loads + merged)
    for i in loads:
        opcode = code.instructions[i].opcode
        assert re.fullmatch(r"LDG\.E(\.\d+)?|(buffer|global)_load_dword(x\d)?", opcode), opcode
    if code.architecture != "gfx942":
        return  # NVIDIA's barrier orders the memory of its threads
    # AMD's barrier orders no memory: fences around it do, if they are not of LDS alone. In LLVM's memory model of
    # gfx942 a release within a work-group then waits for no store (no s_waitcnt vmcnt(0)), because its warps share
    # the L1 cache of one compute unit, which takes their requests in order. In split mode they do not.
    assert not code.split
    for lines in barriers:
        assert [x.opcode for x in code.fences if x.line in lines] == ["release", "barrier", "acquire"]


def _places(code: Code, statements: list[range], pattern: str) -> list[int]:
    """Return where instructions like ``pattern`` stand that come from the lines of these statements."""
    lines = {line for span in statements for line in span}
    return [i for i, x in enumerate(code.instructions) if x.line in lines and re.search(pattern, x.opcode)]


KERNELS = (("forward with stats", True), ("forward", False), ("backward", True), ("backward", False))


@pytest.fixture(scope="module")
def codes() -> dict[tuple[str, str, bool], Code]:
    """Machine code by architecture, kernel and whether it has several products."""
    requests = [(arch, *kernel) for arch in ARCHITECTURES for kernel in KERNELS]
    return dict(zip(requests, compiled(*requests), strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS[:2], ids=str)
def test_the_merge_reads_what_was_parked(arch, kernel, codes):
    assert_ordered(codes[(arch, *kernel)])


@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_shows_in_machine_code(name):
    (code,) = compiled(("sm_80", "forward", False), bug=BUGS[name])
    with pytest.raises(AssertionError, match="no barrier between"):
        assert_ordered(code)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_another_instruction_in_the_merge_shows(arch, codes):
    """What the compilers do not make today: loads that are not coherent, and stores after the barrier."""
    code = codes[arch, "forward", False]
    barrier = lines_of(*FORWARD, "tl.debug_barrier()")[0]
    late = [x for x in code.instructions if x.line not in barrier]
    late[1:1] = [x for x in code.instructions if x.line in barrier]
    names = (("LDG.E", "LDG.E.CONSTANT"), ("buffer_load", "s_buffer_load"))
    constant = code.instructions
    for name, other in names:
        constant = [x._replace(opcode=x.opcode.replace(name, other)) for x in constant]
    for instructions in (constant, late):
        assert instructions != code.instructions
        with pytest.raises(AssertionError):
            assert_ordered(code._replace(instructions=instructions))


def test_a_barrier_that_orders_lds_alone_shows(codes):
    """On gfx942, as those around reductions; and the mode in which warps share no cache."""
    code = codes["gfx942", "forward", False]
    local = [x._replace(opcode=f"{x.opcode} local") for x in code.fences]
    assert "release local" in {x.opcode for x in code.fences}
    for wrong in (code._replace(fences=local), code._replace(fences=[]), code._replace(split=True)):
        with pytest.raises(AssertionError):
            assert_ordered(wrong)


def _strip_words(code: Code) -> set[int]:
    """Return the widths in bytes of the stores that write gradient tiles to strips."""
    opcodes = {
        code.instructions[i].opcode
        for i in _places(
            code, lines_of("_triton_backward.py", "backward_kernel", "_store_strip("), r"ST|store"
        )
    }
    bits = {re.sub(r".*?(\d+)?$", r"\1", opcode) or "32" for opcode in opcodes if opcode.startswith("ST")}
    names = {"short": 2, "dword": 4, "dwordx2": 8, "dwordx4": 16}
    words = {names[opcode.rpartition("_")[2]] for opcode in opcodes if not opcode.startswith("ST")}
    return words | {int(number) // 8 for number in bits}


@pytest.mark.parametrize("kernel", KERNELS[2:], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_strips_are_stored_in_wide_words(arch, kernel, codes):
    """16 bytes, or all that a thread has of a tile; on gfx942 the four numbers that a product leaves to a lane."""
    tile = TABLES[arch]["backward", kernel[1], 16][0]
    share = 2 * tile.block_n * tile.block_m // (32 * tile.num_warps)
    assert _strip_words(codes[(arch, *kernel)]) == {8 if arch == "gfx942" else min(16, share)}


def test_a_mask_along_rows_makes_the_stores_narrow():
    (code,) = compiled(("sm_80", "backward", False), bug=NARROW)
    assert _strip_words(code) == {2}
