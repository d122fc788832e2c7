"""One rank of ``benchmarks.ranks``: the losses across ranks, checked, counted and timed in turns."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip.loss
import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import published
from benchmarks.competitors import OPEN_CLIP, TOLERANCE, WEIGHTS, Problem, Step
from benchmarks.harness import plain
from benchmarks.measure import allocated, interleaved, require_close
from tracer.ops import contrastive_loss

MESH, RING = "ours", "ours, ring"
GATHERED = "published, gathered"


class Plan(NamedTuple):
    """What the ranks measure: a case in one precision, the batch of all ranks, and who takes part."""

    case: str
    precision: str
    pairs: int
    width: int
    competitors: list[str]
    expected: str  # file of loss and gradients of the whole batch on one process
    repeats: int


def main(rank: int, world_size: int, port: int, plans: Sequence[Plan], results: Path) -> None:
    """Carry out the plans, one after the other; rank 0 writes ``results``, a JSON list in their order."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # open_clip gathers by an older name
    dist.init_process_group("gloo")
    measured = [_carry_out(plan) for plan in plans]
    if rank == 0:
        results.write_text(json.dumps(measured, default=plain))
    dist.barrier()
    dist.destroy_process_group()


def _carry_out(plan: Plan) -> dict[str, Any]:
    mine = RankProblem(plan.pairs, plan.width)
    steps = {name: mine.step(plan.case, name, plan.precision) for name in plan.competitors}
    entries: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        step()
        mine.check(plan, name, step.result())
        # The largest of all ranks' numbers.
        counts = torch.tensor(
            [allocated(step), products_taken(step) / mine.unit, received(step)], dtype=torch.float64
        )
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        memory, units, received_bytes = counts.tolist()
        entries[name] = {"memory": int(memory), "units": units, "received": int(received_bytes)}
    calls = {name: partial(_together, step) for name, step in steps.items()}
    for name, time in interleaved(calls, repeats=plan.repeats).items():
        entries[name]["time"] = time
    return {**plan._asdict(), "ranks": dist.get_world_size(), "competitors": entries}


def _together(step: Step) -> None:
    step()
    dist.barrier()  # so that a step takes as long as on the slowest rank


class RankProblem(Problem):
    """The part of a batch that this rank holds, and the losses of the whole batch."""

    def __init__(self, pairs: int, width: int) -> None:
        super().__init__(pairs, width, device="cpu")
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        first = self.rank * pairs // self.ranks
        self.rows = slice(first, first + pairs // self.ranks)
        image, text, scale = self.student
        self.student = [x.detach()[self.rows].clone().requires_grad_() for x in (image, text)] + [scale]
        self.teacher = [x[self.rows].clone() for x in self.teacher[:2]] + self.teacher[2:]
        self.unit = (
            2 * pairs * pairs // self.ranks * width
        )  # operations of a product over this rank's rectangle

    def loss(self, case: str, competitor: str) -> Callable[[], Tensor]:
        """Return a call that computes a competitor's loss of the student's features."""
        image, text, scale = self.student
        if competitor in (MESH, RING):
            group = dist.group.WORLD if self.ranks > 1 else None
            mesh = "ring" if competitor == RING else None
            options = {**self.options(case), "group": group, "mesh": mesh}
            return lambda: contrastive_loss(image, text, scale, impl="blocked", **options).loss
        if competitor == OPEN_CLIP:
            across = {"rank": self.rank, "world_size": self.ranks} if self.ranks > 1 else {}
            loss = open_clip.loss.ClipLoss(local_loss=True, gather_with_grad=True, **across)
            return partial(loss, image, text, scale)
        return partial(self._gathered, case)

    def _gathered(self, case: str) -> Tensor:
        """Compute the published objective as it is written, on the features of all ranks."""
        image, text, scale = self.student
        teacher_image, teacher_text, teacher_logit_scale = self.teacher
        features = [image, text, teacher_image, teacher_text]
        if self.ranks > 1:
            features = [torch.cat(torch.distributed.nn.all_gather(x)) for x in features]
        inputs = (*features[:2], scale, *features[2:], teacher_logit_scale)
        return published.tracer_loss(*inputs, **WEIGHTS)  # type: ignore[arg-type]

    def check(self, plan: Plan, competitor: str, result: Sequence[Tensor]) -> None:
        """Check a competitor's loss and gradients as an engine that averages gradients would see them.

        Raises:
            WrongResult: one of them is wrong; ends the benchmark.
        """
        loss, image, text, scale = result
        for averaged in (loss, scale):
            dist.all_reduce(averaged)
            averaged /= self.ranks
        whole = torch.load(plan.expected, weights_only=True)
        wanted = [whole[0], whole[1][self.rows], whole[2][self.rows], whole[3]]
        names = ("loss", "image gradient", "text gradient", "scale gradient")
        got = (loss, image / self.ranks, text / self.ranks, scale)
        for what, have, right in zip(names, got, wanted, strict=True):
            title = f"{plan.case}, {plan.precision}, {self.ranks} ranks: {what} of {competitor}"
            require_close(title, have, right, TOLERANCE[plan.precision])


def products_taken(call: Callable[[], Any]) -> int:
    """Return the operations of all matrix products of a call, by the shapes that torch's profiler records."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        call()
    operations = 0
    for event in profile.events():
        shapes = [shape for shape in event.input_shapes if len(shape) >= 2]
        if event.name in ("aten::mm", "aten::bmm"):
            operations += 2 * math.prod(shapes[0]) * shapes[1][-1]
        elif event.name in ("aten::addmm", "aten::addmm_"):
            operations += 2 * math.prod(shapes[1]) * shapes[2][-1]
        elif event.name == "mkldnn::_linear_pointwise":  # the second operand is transposed
            operations += 2 * math.prod(shapes[0]) * shapes[1][0]
    return operations


def received(call: Callable[[], Any]) -> int:
    """Return the bytes that this rank receives from others in a call."""
    with Received() as count:
        call()
    return count.bytes


class Received(TorchDispatchMode):
    """Counts the bytes of elements that this rank receives from others, by the collectives' own arguments.

    An all-reduce counts as its two halves, a reduce-scatter and an all-gather.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count the call's bytes, then make it."""
        name = func._schema.name
        if name == "_c10d_functional::all_gather_into_tensor":
            self.bytes += args[0].nbytes * (args[1] - 1)
        elif name == "_c10d_functional::all_to_all_single":
            row = args[0].nbytes // max(1, len(args[0]))
            mine = dist.get_rank(dist.distributed_c10d._resolve_process_group(args[3]))
            self.bytes += row * (sum(args[1]) - args[1][mine])
        elif name == "c10d::allgather_":
            parts, mine = args[0][0], dist.get_rank()
            self.bytes += sum(part.nbytes for rank, part in enumerate(parts) if rank != mine)
        elif name == "c10d::scatter_":  # gloo has no all-to-all of lists: every rank scatters in turn
            root = args[3]
            self.bytes += args[0][0].nbytes if root != dist.get_rank() else 0
        elif name in ("_c10d_functional::all_reduce", "c10d::allreduce_"):
            tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
            ranks = dist.get_world_size()
            self.bytes += 2 * tensor.nbytes * (ranks - 1) // ranks
        return func(*args, **(kwargs or {}))
