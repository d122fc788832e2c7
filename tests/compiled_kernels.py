"""Machine code of the loss kernels with the line of the kernel that each instruction comes from, for tests.

Programs that interpret kernels cannot compile them, so :func:`compiled` starts this file as a program of its own.
It compiles for the architectures of ``benchmarks/machine_code.py``, without a GPU.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# What moves memory or waits. The order of instructions in the listing is that of the kernel's steps.
_OPCODE = re.compile(
    r"^\s*(?:/\*\w+\*/\s+)?(?:@!?U?P\w+\s+)?((?:LDG|STG|BAR|ST|LD)\.\S+|s_barrier|(?:buffer|global|flat|s_buffer|s)_(?:load|store)_\w+)"
)


class Instruction(NamedTuple):
    """An instruction that moves memory or waits, and the line of the kernel's file that it comes from."""

    opcode: str
    line: int


class Code(NamedTuple):
    """A compiled kernel."""

    architecture: str
    kernel: str
    many: bool  # more than one product
    instructions: list[Instruction]
    split: bool  # AMD's mode in which the warps of a program run on several compute units
    fences: list[
        Instruction
    ]  # of AMD's compiler: barriers and the fences around them, "local" if of LDS alone


def compiled(*requests: tuple[str, str, bool], bug: tuple[str, str, str] | None = None) -> list[Code]:
    """Compile kernels of the table's first tiles in 16 bits, with all options.

    Args:
        requests: architecture, kernel of the table, and whether it has several products.
        bug: file, text and what takes its place; see ``planted.Bug``.
    """
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, __file__, json.dumps({"requests": requests, "bug": bug})]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    codes = [Code(*json.loads(line)) for line in run.stdout.splitlines()]
    return [
        code._replace(
            instructions=[Instruction(*i) for i in code.instructions],
            fences=[Instruction(*i) for i in code.fences],
        )
        for code in codes
    ]


def lines_of(file: str, kernel: str, text: str) -> list[range]:
    """Return the lines of each statement, without the compound ones, of a kernel that contains ``text``."""
    source = (ROOT / "kernels" / file).read_text()
    function = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == kernel)
    statements = (n for n in ast.walk(function) if isinstance(n, (ast.Assign, ast.AugAssign, ast.Expr)))
    spans = (
        (s.lineno, s.end_lineno or s.lineno) for s in statements if text in ast.get_source_segment(source, s)
    )
    return [range(first, last + 1) for first, last in sorted(spans)]


def _instructions(arch: str, asm: dict, file: str) -> list[Instruction]:
    if "cubin" in asm:
        import triton

        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(asm["cubin"])
            cubin.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
            command = [str(tool), "-gi", "-c", cubin.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        place = re.compile(rf'//## File ".*{file}", line (\d+)$')
    else:
        text, place = asm["amdgcn"], re.compile(rf"\.loc\s.*{file}:(\d+):\d+(?: \])*$")
    found, line = [], 0
    for row in text.splitlines():
        if at := place.search(row.rstrip()):
            line = int(at[1])
        elif opcode := _OPCODE.match(row):
            found.append(Instruction(opcode[1], line))
    return found


def _fences(llir: str) -> list[Instruction]:
    """Return what orders memory in LLVM's representation: ``release``, ``barrier``, ``acquire``, with their lines.

    Triton marks a fence that orders LDS alone with a tag (``!mmra``).
    """
    places = re.finditer(r"^(!\d+) = !DILocation\(line: (\d+),", llir, re.MULTILINE)
    lines = {place[1]: int(place[2]) for place in places}
    found = []
    for row in llir.splitlines():
        kind = re.search(r'fence syncscope\("workgroup"\) (\w+)|call void @llvm.amdgcn.s.(barrier)\(\)', row)
        place = re.search(r"!dbg (!\d+)", row)
        if kind and place:
            local = " local" if "!mmra" in row else ""
            found.append(Instruction((kind[1] or kind[2]) + local, lines[place[1]]))
    return found


def _compile(arch: str, kernel: str, many: bool) -> Code:
    from benchmarks import machine_code

    case = machine_code.Case(arch, kernel, many, 16, machine_code.TABLES[arch][kernel, many, 16][0], True)
    asm = machine_code.binaries(case, 1)[kernel].asm
    file = "_triton_backward.py" if kernel == "backward" else "_triton_forward.py"
    split = ".amdhsa_tg_split 1" in asm.get("amdgcn", "")
    fences = _fences(asm["llir"]) if "amdgcn" in asm else []
    return Code(arch, kernel, many, _instructions(arch, asm, file), split, fences)


def _main() -> None:
    import planted

    from benchmarks import machine_code

    asked = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        real, bug = machine_code.contrastive_triton, asked["bug"] and planted.Bug(*asked["bug"])
        with planted.planted(bug, Path(folder)) if bug else nullcontext(real) as launchers:
            machine_code.contrastive_triton = launchers
            for request in asked["requests"]:
                print(json.dumps(_compile(*request)))


if __name__ == "__main__":
    _main()
