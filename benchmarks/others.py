"""The Triton kernels of other packages beside TRACER's, without a GPU: counted, compiled and estimated.

    python -m benchmarks.others

The packages are Inf-CL and memeff, which compute the CLIP loss, and siglip-kernel, whose loss is another one: a
sigmoid for each pair, which needs no statistics. All come from the package index, at the versions of the lock
file, and are called as their users call them; TRACER's CLIP loss and its sigmoid stand beside them. Nothing is
counted before loss and gradients agree with the definition.

**Counted**, in Triton's interpreter and by torch's dispatcher: products in units of 2·N²·D operations, those of
torch included; bytes that the kernels load and store; bytes that torch's own operations read and write, matrix
products included, each operand once; atomic additions; launches; bytes allocated at once beyond the inputs.
**Compiled** for the architectures of ``machine_code``: registers, spills, shared memory. **Estimated** is what the
data sheet of a card allows, beside the times that the packages publish. No time here was measured by us.

The packages are in ``packages.py``, the tables in ``others_page.py``.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from benchmarks import disassembly, machine_code, packages, published, roofline, work
from benchmarks.counting import Allocated, Traffic, Work, counting
from benchmarks.harness import command_line, progress
from benchmarks.measure import require_close
from benchmarks.others_page import LARGEST, OUR_SIGMOID, OURS, exact, highlights, report
from benchmarks.packages import (
    INF_CL,
    INF_CL_ROWS,
    PACKAGES,
    PUBLISHED,
    SCALE,
    SIGLIP_KERNEL,
    Package,
    Published,
)  # fmt: skip
from benchmarks.work import ARCHITECTURES, PASSES
from tracer.kernels import contrastive_triton, sigmoid_triton
from tracer.kernels._tiles import TABLES, tiles_of
from tracer.kernels._triton import planning_for, recording
from tracer.kernels.contrastive import Biases, Inputs, Needs, Options
from tracer.kernels.sigmoid import PairNeeds

__all__ = ["exact", "highlights", "measure", "report"]

PLACES = 132  # multiprocessors of the GPU that grids are for
MEMORY_SIZE = (16384, 512)
EVERYONE = (OURS, OUR_SIGMOID, *PACKAGES)
Leaves = tuple[Tensor, Tensor, Tensor]
Grads = tuple[Tensor | None, ...]


# ---------------------------------------------------------------------------------------------------
# Counted.


def count(architecture: str, N: int, D: int) -> list[dict[str, Any]]:
    """Return the work for N pairs of width D in float16, ours first, in a process that interprets.

    Inf-CL is left out where N is large.
    """
    everyone = [who for who in EVERYONE if who != INF_CL or N <= INF_CL_ROWS]
    with packages.as_if_on(architecture, PLACES), planning_for(architecture, PLACES):
        return [_count(who, architecture, N, D) for who in everyone]


def _count(who: str, architecture: str, N: int, D: int) -> dict[str, Any]:
    image, text = (x.half().requires_grad_() for x in _features(N, D))
    passes = _passes(who, architecture, (image, text, torch.tensor(SCALE, requires_grad=True)))
    work_of: dict[str, Work] = {}
    units: dict[str, float] = {}
    mapping = {torch.ops.aten.addmm_: _addmm_flop}  # in place: torch's counter knows addmm alone
    for when in PASSES:
        with counting() as done, FlopCounterMode(display=False, custom_mapping=mapping) as products:
            result = next(passes)
        work_of[when] = done
        units[when] = (done.flops + products.get_total_flops()) / (2 * N * N * D)
    require_agreement(who, *result)
    return {
        "who": who,
        "architecture": architecture,
        "rows": N,
        "width": D,
        "units": units,
        "bytes": {when: done.loaded + done.stored for when, done in work_of.items()},
        "atomics": {when: done.atomics for when, done in work_of.items()},
        "launches": {when: done.launches for when, done in work_of.items()},
        "torch_bytes": count_without_data(who, architecture, N, D)["torch_bytes"],
    }


def _features(N: int, D: int) -> tuple[Tensor, Tensor]:
    """Return features with cosine 0.24 within a pair, float32 numbers that float16 represents."""
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, N, D, generator=generator)
    image, text = (torch.nn.functional.normalize(x, dim=1).half() for x in (image, image / 4 + noise))
    return image.float(), text.float()


def _passes(who: str, architecture: str, leaves: Leaves) -> Iterator[tuple[Tensor, Grads]]:
    """Make the forward pass, then the backward pass, and yield after each; at last loss and gradients.

    Ours are the launchers' own: the public function hides torch's operations in a custom operator.
    """
    if who == OURS:
        inputs, options = Inputs(*(x.detach() for x in leaves)), Options()
        tiles = work.tiles(architecture, "CLIP")
        # The interpreter is fast in large steps of the same work; what is compiled takes the table's.
        tiles = {kernel: tile._replace(block_d=inputs.image.shape[1]) for kernel, tile in tiles.items()}
        forward = contrastive_triton.forward(inputs, options, tile=tiles["forward"])
        yield forward.terms[0], ()
        upstream = torch.ones_like(forward.terms)
        grads = contrastive_triton.backward(
            upstream, inputs, forward.saved, options, Needs(), tile=tiles["backward"]
        )
        yield forward.terms[0], (grads.image, grads.text, grads.logit_scale)
    elif who == OUR_SIGMOID:
        yield from _sigmoid_passes(architecture, Inputs(*(x.detach() for x in leaves)))
    else:
        loss = PACKAGES[who].loss(*leaves)
        yield loss, ()
        yield loss, torch.autograd.grad(loss, leaves, allow_unused=not PACKAGES[who].has_scale)


def _sigmoid_passes(architecture: str, inputs: Inputs) -> Iterator[tuple[Tensor, Grads]]:
    """Yield twice what the one walk makes, loss and gradients: nothing is left for the backward pass."""
    N, D = inputs.image.shape
    tile = tiles_of(TABLES[architecture], "sigmoid", False, 16)[0]._replace(block_d=D)
    options, needs = Options(sigmoid=True), PairNeeds(*[True] * 5)
    bias = torch.zeros_like(inputs.logit_scale)
    pairs = sigmoid_triton.walk(inputs, Biases(bias, bias), options, needs, tile=tile)
    assert pairs.sums is not None
    gradients = tuple(None if x is None else x.div_(N) for x in (pairs.image, pairs.text, pairs.logit_scale))
    for _ in PASSES:
        yield pairs.sums[0] / N, gradients


def _addmm_flop(_: Any, a: tuple[int, int], b: tuple[int, int], **options: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def require_agreement(who: str, loss: Tensor, grads: Grads) -> None:
    """Compare loss and gradients of ``_features`` with the definition in float64; a gradient of None is left out.

    Raises:
        WrongResult: they disagree; ends the benchmark.
    """
    if who in PACKAGES:
        defined = PACKAGES[who].defined
    else:
        defined = published.clip_loss if who == OURS else published.siglip_loss
    N, D = next(x for x in grads if x is not None).shape
    exact = [x.double().requires_grad_() for x in (*_features(N, D), torch.tensor(SCALE))]
    right = defined(*exact)
    wanted = right, *torch.autograd.grad(right, exact)
    names = ("loss", "image gradient", "text gradient", "scale gradient")
    for name, got, want in zip(names, (loss, *grads), wanted, strict=True):
        if got is not None:
            require_close(f"{name} of {who}", got.detach(), want.detach(), 2e-3)


def count_without_data(who: str, architecture: str, N: int, D: int) -> dict[str, Any]:
    """Return the bytes that are alive at once beyond the inputs, and those that torch moves, by pass.

    A call in bfloat16 runs on tensors without data and without its kernels.
    """
    place = "cpu" if who in PACKAGES else "cuda"  # our launchers' products go another way on a CPU
    no_launch = patch.object(InterpretedFunction, "run", lambda *_, **__: None)
    counted: dict[str, Any] = {"memory": {}, "torch_bytes": {}}
    with (
        packages.as_if_on(architecture, PLACES),
        planning_for(architecture, PLACES),
        recording(execute=False),
        no_launch,
        FakeTensorMode(),
    ):
        image, text = (torch.empty(N, D, dtype=torch.bfloat16, device=place) for _ in range(2))
        leaves = (
            image.requires_grad_(),
            text.requires_grad_(),
            torch.ones((), device=place).requires_grad_(),
        )
        passes = _passes(who, architecture, leaves)
        with Allocated(leaves) as made:
            for when in PASSES:
                made.peak = 0
                with Traffic() as moved:
                    result = next(passes)
                counted["memory"][when], counted["torch_bytes"][when] = made.peak, moved.bytes
            del result
    return counted


def count_memory(N: int, D: int) -> list[dict[str, Any]]:
    """Return the bytes that everyone holds at once beyond the inputs."""
    return [
        {"who": who, "rows": N, "width": D, **count_without_data(who, "sm_90", N, D)["memory"]}
        for who in EVERYONE
    ]


# ---------------------------------------------------------------------------------------------------
# Compiled.


def compiled(architecture: str, half_only: bool) -> list[dict[str, Any]]:
    """Compile what N 1024 and D 512 launch, in a process of its own: siglip-kernel asks for the GPU at import."""
    rows: dict[str, dict[str, Any]] = {}
    for bits, dtype in ((16, torch.bfloat16), (32, torch.float32))[: 1 if half_only else 2]:
        for who, package in PACKAGES.items():
            if who == INF_CL and architecture == "gfx942":
                continue  # an instruction in NVIDIA's assembly
            for name, code in _binaries(architecture, package, dtype):
                # Inf-CL converts features to float32 whatever they are.
                row = _machine_code(architecture, who, 32 if who == INF_CL else bits, name, code)
                rows[str(row)] = row  # both directions of a gradient take the same kernel
    return list(rows.values())


def _binaries(architecture: str, package: Package, dtype: torch.dtype) -> list[tuple[str, Any]]:
    """Return the compiled kernels of one call; an autotuned one in all its configurations."""
    codes: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        codes.append((self.__name__, run(self, *arguments, grid=grid, warmup=True, **options)))

    def every(self: Any, *arguments: Any, **options: Any) -> None:
        self.nargs = dict(zip(self.arg_names, arguments, strict=False))
        for config in self.prune_configs(options):
            self.fn.run(*arguments, **options, **config.all_kwargs())

    image, text = (torch.zeros(1024, 512, dtype=dtype, requires_grad=True) for _ in range(2))
    with (
        machine_code.target(architecture, "tf32"),
        packages.as_if_on(architecture, PLACES),
        patch.object(JITFunction, "run", compile_only),
        patch.object(Autotuner, "run", every),
    ):
        leaves = (image, text, torch.tensor(SCALE, requires_grad=True))
        torch.autograd.grad(package.loss(*leaves), leaves, allow_unused=not package.has_scale)
    return codes


def _machine_code(architecture: str, who: str, bits: int, name: str, code: Any) -> dict[str, Any]:
    binary, metadata = disassembly.read(architecture, code.asm), code.metadata
    warps, shared = int(metadata.num_warps), int(metadata.shared)
    columns = getattr(metadata, "tmem_size", None) or 0
    return {
        "architecture": architecture,
        "who": who,
        "kernel": name.strip("_"),
        "bits": bits,
        "warps": warps,
        "stages": int(metadata.num_stages),
        "registers": binary.registers,
        "spilled": binary.spilled,
        "shared": shared,
        "tensor_core": binary.tensor_core,
        "resident_warps": disassembly.resident_warps(architecture, binary.registers, shared, columns, warps),
    }


# ---------------------------------------------------------------------------------------------------
# Estimated.


def estimates(counted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return published times beside the least times by data sheet: ours, and that of their products alone.

    Ours is TRACER's form of the package's loss. ``counted`` are rows of :func:`count`; what more the roofline
    needs of ours is counted here.
    """
    units = {row["who"]: sum(row["units"].values()) for row in counted}
    rows = []
    for told in PUBLISHED:
        least = _least_of_sigmoid(told) if told.who == SIGLIP_KERNEL else _least_of_clip(told)
        product = 2 * told.pairs**2 * told.width / roofline.CARDS[told.architecture].tensor
        least |= {"estimate_their_products": units[told.who] * product}
        rows.append(told._asdict() | least)
    return rows


def _least_of_clip(told: Published) -> dict[str, Any]:
    N, D, places = roofline.COUNTED
    floor = roofline.estimate(work.count("CLIP", N, D, told.architecture, places), told.pairs, told.width)
    return {"ours": OURS, "estimate_ours": sum(floor["estimate_seconds"].values())}


def _least_of_sigmoid(told: Published) -> dict[str, Any]:
    N, D, places = roofline.COUNTED
    image, text = (x.half() for x in _features(N, D))
    with planning_for(told.architecture, places), counting() as done:
        list(_sigmoid_passes(told.architecture, Inputs(image, text, torch.tensor(SCALE))))
    per_logit = done.operations / N**2, done.exponentials / N**2
    seconds = roofline.estimate_sigmoid(told.architecture, *per_logit, told.pairs, told.width)
    return {"ours": OUR_SIGMOID, "estimate_ours": sum(seconds.values())}


# ---------------------------------------------------------------------------------------------------
# The part.


def count_all(sizes: list[tuple[str, int, int]]) -> dict[str, Any]:
    """Return the counts of all sizes, the memory and the estimates, in a process that interprets."""
    rows = [row for size in sizes for row in count(*size)]
    return {"work": rows, "memory": count_memory(*MEMORY_SIZE), "estimates": estimates(rows)}


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Count, compile and estimate.

    Args:
        quick: count N 256, D 64 with sm_90's tiles, and compile for sm_80 in 16 bits; without it count N 1024,
            D 512 with sm_80's and sm_90's tiles too, all but Inf-CL, and compile for all architectures, in float32
            too.

    Raises:
        SystemExit: Triton is interpreting.
        WrongResult: a package's loss or gradient disagrees with the definition.
    """
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: unset it, kernels can only be compiled or interpreted")
    sizes = [("sm_90", INF_CL_ROWS, 64), *([] if quick else [("sm_80", *LARGEST), ("sm_90", *LARGEST)])]
    chosen = ("sm_80",) if quick else ARCHITECTURES
    progress("others: counting and compiling")
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, spawn) as interpreting,
        spawn.Pool(1, maxtasksperchild=1) as compiling,  # siglip-kernel keeps what it asked at import
    ):
        with patch.dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""):  # its process starts here
            counted = interpreting.submit(count_all, sizes)
        codes = [compiling.apply_async(compiled, (architecture, quick)) for architecture in chosen]
        kernels = [row for task in codes for row in task.get()]
        return {
            "versions": {package.name: version(package.name) for package in PACKAGES.values()},
            "triton": triton.__version__,
            **counted.result(),
            "kernels": kernels,
        }


if __name__ == "__main__":
    command_line(measure, report)
