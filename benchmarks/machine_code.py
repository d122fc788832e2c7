"""Every shipped configuration of the kernels, compiled ahead of time for four architectures: its machine code.

    python -m benchmarks.machine_code
    python -m benchmarks.machine_code --architectures '[sm_90]' --full_table true

No GPU is needed: the launchers of ``kernels/contrastive_triton.py`` run on ``meta`` tensors, which hold no data,
and their launches are compiled for the named architecture instead of being started: what is examined is what
would run. Per kernel: registers per thread, bytes spilled to memory (must be 0), shared memory, tensor-core
instructions, how many warps of it a multiprocessor holds at once by registers, shared and tensor memory, and what
the visit of a tile executes (``benchmarks/visits.py``). AMD's scalar registers may be parked in lanes of vector
registers; this causes no memory traffic and is not counted as a spill. Compiled variants are counted of a run
whose sizes, margin, smoothing, scales and temperature change.

The kernel that merges the statistics of a rectangle's rows or columns, which the loss over ranks starts, is
compiled with the largest tile of each kind in 16 bits. ``--quick`` leaves out the variants with fewer options,
except those of the CLIP loss in large batches, and those whose width is not a multiple of a block, and compiles
the combine kernel as seldom. It compiles float32 products, exact or in TF32, only where their tile is not one that
the same kernel has in sm_90's column, and the one-way and sigmoid forms in 16 bits with sm_90's largest alone.

Roofline estimates come from these tiles, counted work and data sheets; see ``benchmarks/roofline.py``. The tables
are in ``machine_code_page.py``.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tokenize
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks import disassembly, roofline, visits
from benchmarks.harness import command_line, progress
from benchmarks.machine_code_page import AVERAGE, every, exact, highlights, report
from benchmarks.work import ARCHITECTURES, OBJECTIVES, PASSES, Architecture
from tracer.kernels import average_triton, contrastive_triton, sigmoid_triton
from tracer.kernels._tiles import COMBINE, LIKE, MERGE, TABLES, Tile, tiles_of
from tracer.kernels._triton import Launch, planning_for, recording
from tracer.kernels.contrastive import Biases, Inputs, Needs, Options, Saved, Statistics
from tracer.kernels.sigmoid import PairNeeds

__all__ = ["exact", "highlights", "measure", "report"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FULL = OBJECTIVES["full objective"].options
# A call of one direction that measures diagnostics walks in both, with weights of its own.
ONE_WAY, MEASURED, SIGMOID = (
    "one direction, rows left out",
    "one direction with stats, rows left out",
    "sigmoid",
)
# By the kernel whose tiles they take unless they have their own: names in the tables, and forms.
_FORMS_OF = {
    "forward": (("forward, one way", ONE_WAY),),
    "forward with stats": (("forward with stats", MEASURED),),
    "backward": (("backward, one way", ONE_WAY), ("backward", MEASURED), ("sigmoid", SIGMOID)),
}


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
    form: str = ""  # of the contrastive term, if it is not the softmax in both directions

    @property
    def name(self) -> str:
        """The kernel's name in tables."""
        return f"{self.kernel}, {self.form}" if self.form else self.kernel


@dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel, bytes of a thread's spills and of a program's shared memory."""

    architecture: str
    kernel: str
    products: str  # of a tile: "one" or "several"
    bits: int
    tile: tuple[int, ...]  # the combine kernel's depends on it
    warps: int
    stages: int
    options: str  # all of labels, margin and smoothing, or none; where the average has its weight
    width: int
    registers: int
    spilled: int
    shared: int
    tensor_core: int
    resident_warps: int
    visit: dict[str, int] | None = None  # what a visit of a tile executes, of kernels that walk over tiles
    step: dict[str, int] | None = None  # the part of it that each block of D adds


class _Driver:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def target(arch: str, precision: str = "ieee") -> Iterator[None]:
    """Make Triton compile for ``arch``, and launchers plan for it, with float32 products of this precision."""
    matmul = torch.backends.cuda.matmul
    kept = driver._active, matmul.fp32_precision
    matmul.fp32_precision = precision
    driver.set_active(_Driver(TARGETS[arch]))  # type: ignore[arg-type]
    try:
        with planning_for(arch, 132):
            yield
    finally:
        driver._active, matmul.fp32_precision = kept


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _call(case: Case, N: int = 1024) -> tuple[Inputs, Options]:
    """Return the inputs and options that make the launchers use the kernels of a case."""
    feature = _empty(N, case.width, dtype=torch.bfloat16 if case.bits == 16 else torch.float32)
    inputs = Inputs(feature, feature, _empty())
    if case.many:
        inputs = inputs._replace(teacher_image=feature, teacher_text=feature, teacher_logit_scale=_empty())
    if case.options:
        y = _empty(N, dtype=torch.int64)
        inputs = inputs._replace(labels=y, text_labels=y)
    options = Options(
        margin=0.05 if case.options else 0.0,
        smoothing=0.05 if case.options else 0.0,
        relational=case.many,
        interactive=case.many,
        cross=case.many,
        stats=case.kernel == "forward with stats" or case.form == MEASURED,
    )
    if case.form in (ONE_WAY, MEASURED):
        options = options._replace(image_to_text=1.0, text_to_image=0.0, ignore=True)
    if case.form == SIGMOID:
        options = options._replace(sigmoid=True)
    return inputs, options


def compile_case(case: Case, number: int = 4) -> list[Report]:
    """Compile one case and read the machine code; see :func:`binaries`."""
    return [_loss_report(case, name, code) for name, code in binaries(case, number).items()]


def binaries(case: Case, number: int = 4) -> dict[str, Any]:
    """Compile one case and return the first ``number`` of its kernels by name.

    Those that merge partial statistics follow a kernel of the forward kinds: combine, into the terms of a whole
    call, then merge, into the rows and into the columns of a rectangle.
    """
    inputs, options = _call(case)
    with target(case.arch, "tf32" if case.bits == 19 else "ieee"):
        with recording(execute=False, keep_arguments=True) as launches:
            if case.form == SIGMOID:
                biases = Biases(_empty(), _empty())
                upstream = _empty(4) if case.many else None  # two terms have an upstream gradient each
                sigmoid_triton.walk(inputs, biases, options, PairNeeds(*[True] * 5), upstream, tile=case.tile)
            elif case.kernel == "backward":
                stats = _empty(len(Statistics._fields), 1024)
                saved = Saved(stats, stats)
                contrastive_triton.backward(_empty(4), inputs, saved, options, Needs(), tile=case.tile)
            else:
                contrastive_triton.forward(inputs, options, tile=case.tile)
                contrastive_triton.statistics(inputs, options, tile=case.tile)
        names = [case.name]
        if len(launches) > 1:
            del launches[2]  # the walk again, for the statistics of a rectangle
            names += [f"{kind} of {case.name}" for kind in ("combine", "merge of rows", "merge of columns")]
        named = list(zip(names, launches, strict=False))[:number]
        if case.form == MEASURED and len(named) > 1:
            named = named[1:2]  # walk and merge are those of both directions
        return {name: launch.compile() for name, launch in named}


def compile_average(arch: str, on_device: bool) -> Report:
    """Compile the moving average, its weight a number or on the device, and read the machine code."""
    average, param, weight = torch.zeros(1), torch.zeros(1), torch.zeros(()) if on_device else 0.5
    with target(arch), recording(execute=False, keep_arguments=True) as launches:
        average_triton.average_([average], [param], weight)
        code = launches[0].compile()
    options = "weight on the device" if on_device else "weight a number"
    return _read(arch, code, AVERAGE, "none", 32, (average_triton.BLOCK,), options, 0)


def _loss_report(case: Case, name: str, code: Any) -> Report:
    return _read(
        case.arch,
        code,
        name,
        "several" if case.many else "one",
        case.bits,
        case.tile[:3],
        "all" if case.options else "none",
        case.width,
        case.tile if name == case.name else None,
    )


def _read(
    arch: str,
    code: Any,
    kernel: str,
    products: str,
    bits: int,
    tile: tuple[int, ...],
    options: str,
    width: int,
    walked: Tile | None = None,
) -> Report:
    """Return the report of a compiled kernel, which may walk over tiles."""
    binary = disassembly.read(arch, code.asm)
    warps, shared = int(code.metadata.num_warps), int(code.metadata.shared)
    tensor_memory = getattr(code.metadata, "tmem_size", None) or 0
    counted = visits.count(arch, binary.text, walked, warps, width) if walked else None
    return Report(
        architecture=arch,
        kernel=kernel,
        products=products,
        bits=bits,
        tile=tile,
        warps=warps,
        stages=int(code.metadata.num_stages),
        options=options,
        width=width,
        registers=binary.registers,
        spilled=binary.spilled,
        shared=shared,
        tensor_core=binary.tensor_core,
        resident_warps=disassembly.resident_warps(arch, binary.registers, shared, tensor_memory, warps),
        visit=counted[0]._asdict() if counted else None,
        step=counted[1]._asdict() if counted else None,
    )


def shipped(architectures: list[str], quick: bool) -> list[Case]:
    """Return every entry of the named architectures' tables, with all options and, unless quick, without, and
    with a width that no block divides. Forms of the contrastive term, if quick, with sm_90's largest alone; what
    measuring adds to one direction in any case with the largest in 16 bits.
    """
    variants = ((True, 512),) if quick else ((True, 512), (False, 512), (True, 520))
    cases = [
        Case(arch, kernel, many, bits, tile, options, width)
        for arch in architectures
        for kernel, many, bits in TABLES[arch]
        if kernel not in LIKE
        for options, width in variants
        for tile in _tiles_of(arch, kernel, many, bits, options)
    ]
    cases += [
        Case(arch, kernel, many, bits, tile, True, 512, form)
        for arch in architectures
        for kernel, many, bits in TABLES[arch]
        for name, form in _FORMS_OF.get(kernel, ())
        for tile in tiles_of(TABLES[arch], name, many, bits)[: 1 if quick or form == MEASURED else None]
        if (arch, bits) == ("sm_90", 16) or not (quick or (form == MEASURED and bits != 16))
    ]
    if not quick:
        return cases
    cases += [
        Case(arch, kernel, False, 16, _tiles_of(arch, kernel, False, 16, options=False)[0], options=False)
        for arch in architectures
        for kernel in PASSES
    ]

    def known(case: Case) -> bool:
        """Whether sm_90 compiles the same in float32."""
        entry = TABLES["sm_90"].get((case.kernel, case.many, case.bits), ())
        return case.bits != 16 and case.arch != "sm_90" and case.tile in entry

    return [case for case in cases if not known(case)]


def _tiles_of(arch: str, kernel: str, many: bool, bits: int, options: bool) -> tuple[Tile, ...]:
    """Return the tiles of a kernel that no form has, with all options or without."""
    plain = kernel in PASSES and not (many or options)
    return tiles_of(TABLES[arch], f"{kernel}, plain" if plain else kernel, many, bits)


def _is_largest(case: Case) -> bool:
    """Whether this is the largest tile of its kind in 16 bits, with all options."""
    kernel = next((name for name, form in _FORMS_OF.get(case.kernel, ()) if form == case.form), case.kernel)
    tiles = tiles_of(TABLES[case.arch], kernel, case.many, case.bits)
    return case.bits == 16 and case.tile == tiles[0] and case.options and case.width == 512


def compile_all(
    architectures: list[str], quick: bool
) -> tuple[list[Report], dict[str, int], list[dict[str, Any]]]:
    """Return reports of all kernels, compiled variants of a varied run, and estimates, on all processors."""
    cases = sorted(shipped(architectures, quick), key=lambda c: (c.many, c.kernel == "forward with stats"))
    cases.reverse()  # the slowest kinds first
    numbers = [4 if _is_largest(case) else 1 if quick else 2 for case in cases]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        work = pool.submit(roofline.counts, architectures)
        counted = pool.submit(variants)
        compiled = pool.map(compile_case, cases, numbers)
        averages = [
            pool.submit(compile_average, arch, where) for arch in architectures for where in (False, True)
        ]
        bar = tqdm(compiled, total=len(cases), desc="compiling", unit="case")
        of_the_loss = [report for reports in bar for report in reports]
        estimated = roofline.estimates(work.result(), [asdict(r) for r in of_the_loss])
        return of_the_loss + [a.result() for a in averages], counted.result(), estimated


def sources() -> str:
    """Return a digest of what decides the loss kernels' machine code, beside Triton: their code and the tiles.

    Comments, docstrings and the layout of lines do not count. While the digest is that of stored results, so is
    the machine code, and nobody needs to compile everything again to know it.
    """
    digest = hashlib.sha256(repr((TABLES, LIKE, MERGE, COMBINE)).encode())
    for path in sorted(Path(contrastive_triton.__file__).parent.glob("_triton_*.py")):
        with path.open("rb") as file:
            digest.update(_code(file.readline).encode())
    return digest.hexdigest()


def _code(readline: Any) -> str:
    """Return the code of a file, one statement a line."""
    layout = (tokenize.ENCODING, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    kept, before, docstring = [], tokenize.ENCODING, False
    for token in tokenize.tokenize(readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        ends_docstring = docstring and token.type == tokenize.NEWLINE
        docstring = token.type == tokenize.STRING and before in layout
        if not (docstring or ends_docstring):
            kept.append("\n" if token.type == tokenize.NEWLINE else token.string.strip())
        before = token.type
    return " ".join(kept)


def variants() -> dict[str, int]:
    """Count compiled variants per kernel and form of a run with changing sizes, strips, numbers and scales."""
    counts: dict[str, int] = {}
    for form in ("", ONE_WAY, MEASURED, SIGMOID):
        kernels: dict[str, Any] = {}
        before: dict[str, int] = {}
        for launch in _varied(form):
            kernel = launch.kernel
            name = f"{kernel.__name__}, {form}" if form not in ("", SIGMOID) else kernel.__name__
            before.setdefault(name, _compiled_variants(kernel))
            with target("sm_90"):
                launch.compile()
            kernels[name] = kernel
        counts |= {name: _compiled_variants(kernel) - before[name] for name, kernel in kernels.items()}
    return {name: count for name, count in counts.items() if count}  # 0: what another form has compiled


def _compiled_variants(kernel: Any) -> int:
    caches = kernel.device_caches
    key = str(TARGETS["sm_90"])
    return len(caches[key][0]) if key in caches else 0


def _varied(form: str) -> list[Launch]:
    """Return the launches of a form of the loss, or without a form also of the average, in a varied run."""
    tile = TABLES["sm_90"]["forward", True, 16][-1]
    with target("sm_90"), recording(execute=False, keep_arguments=True) as launches:
        for N, M in ((512, 512), (511, 512), (1, 1), (16, 48), (1000, 77)):
            feature = _empty(max(N, M), 64, dtype=torch.bfloat16)
            y = _empty(max(N, M) + 1, dtype=torch.int64)[1:]  # the alignment of labels varies too
            inputs = Inputs(
                feature[:N], feature[:M], _empty(), feature[:N], feature[:M], _empty(), y[:N], y[:M]
            )
            for value in (0.01, 0.3, 1.0):
                options = FULL._replace(margin=value, smoothing=value, stats=form in ("", MEASURED))
                if form in (ONE_WAY, MEASURED):
                    options = options._replace(image_to_text=value, text_to_image=0.0, ignore=True)
                if form == SIGMOID:
                    options = Options(margin=value, relational=True, sigmoid=True)
                _both_passes(inputs, options, tile)
                if not form:
                    averages = [torch.zeros(N), torch.zeros(M)]
                    average_triton.average_(averages, [torch.zeros(N), torch.zeros(M)], value)
    return launches


def _both_passes(inputs: Inputs, options: Options, tile: Tile) -> None:
    """Launch everything that a call and a rectangle of one launch, with strips of 64 KiB."""
    upstream, strip_bytes = _empty(4), 1 << 16
    if options.sigmoid:
        biases, needs = Biases(_empty(), _empty()), PairNeeds(*[True] * 5)
        sigmoid_triton.walk(inputs, biases, options, needs, upstream, tile=tile, strip_bytes=strip_bytes)
        return
    saved = contrastive_triton.forward(inputs, options, tile=tile).saved
    contrastive_triton.statistics(inputs, options, tile=tile)
    contrastive_triton.backward(upstream, inputs, saved, options, Needs(), tile=tile, strip_bytes=strip_bytes)


def measure(
    *, quick: bool = False, architectures: list[Architecture] | None = None, full_table: bool = False
) -> dict[str, Any]:
    """Compile the shipped configurations of the loss and of the moving average, and read their machine code.

    Args:
        quick: only what differs most; see the top of this file.
        architectures: these only.
        full_table: print a row for every configuration too.

    Raises:
        SystemExit: Triton is interpreting, or a kernel spills registers.
    """
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: unset it, kernels can only be compiled or interpreted")
    chosen = [str(arch) for arch in architectures or ARCHITECTURES]
    reports, counted, estimated = compile_all(chosen, quick)
    reports.sort(
        key=lambda r: (r.architecture, r.kernel, r.products, r.bits, r.options, r.width, r.tile, r.warps)
    )
    rows = [asdict(r) for r in reports]
    refuse_spills(rows)
    return {
        "triton": triton.__version__,
        "sources": sources(),
        "kernels": rows,
        "variants": counted,
        "estimates": estimated,
        "average_estimates": roofline.average_estimates(chosen),
        "full_table": full_table,
    }


def refuse_spills(rows: list[dict[str, Any]]) -> None:
    """Show the kernels that spill, and raise SystemExit if there are any."""
    if spilling := [row for row in rows if row["spilled"]]:
        progress(every(spilling))
        raise SystemExit(f"{len(spilling)} kernels spill registers to memory: give them smaller tiles")


if __name__ == "__main__":
    command_line(measure, report)
