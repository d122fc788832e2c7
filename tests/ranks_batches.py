"""A batch in parts: what a rank passes to the loss, and what it must get, worked out in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from loss_calls import in_float64, problem
from three_runs import error
from torch import Tensor

from tracer._mesh import MeshShape
from tracer.kernels.contrastive import Needs
from tracer.ops import ContrastiveOutput, contrastive_loss

ROWS = ("image", "teacher_image", "labels")
COLUMNS = ("text", "teacher_text", "text_labels")
DIFFERENTIABLE = (*Needs._fields, "logit_bias")
# The single process's result is met to this in float64, relative to its norm.
EXACT = 1e-12
# What a number in float32 may differ from one whose error happens to be nothing: two units in its last place.
ULPS = 2**-22


def evenly(total: int) -> list[int]:
    """Return the sizes of equal parts, the rank's rows, of so many rows."""
    ranks = dist.get_world_size()
    assert total % ranks == 0
    return [total // ranks] * ranks


def unevenly(total: int, empty: int | None = None) -> list[int]:
    """Return unequal sizes; rank ``empty`` gets none."""
    ranks = dist.get_world_size()
    sizes = [0 if rank == empty else 1 + 2 * rank for rank in range(ranks)]
    sizes[-1 if empty != ranks - 1 else 0] += total - sum(sizes)
    assert min(sizes) >= 0
    return sizes


def part(x: Tensor, sizes: list[int]) -> Tensor:
    """Return this rank's rows."""
    return x.split(sizes)[dist.get_rank()]


def part_of(kwargs: dict[str, Any], rows: list[int], columns: list[int]) -> dict[str, Any]:
    """Return this rank's part of a call."""
    mine = dict(kwargs)
    mine |= {name: part(kwargs[name], rows) for name in ROWS if name in kwargs}
    return mine | {name: part(kwargs[name], columns) for name in COLUMNS if name in kwargs}


def call(
    kwargs: dict[str, Any], needs: tuple[str, ...] = DIFFERENTIABLE, **how: Any
) -> tuple[ContrastiveOutput, dict[str, Tensor]]:
    """Return the output of a call and the gradients of its loss by name."""
    kwargs = dict(kwargs)
    names = [name for name in DIFFERENTIABLE if name in kwargs]
    leaves = {name: kwargs.pop(name).clone().requires_grad_(name in needs) for name in names}
    output = contrastive_loss(**leaves, **kwargs, **how)
    if needs:
        (1.5 * output.loss).backward()
    return output, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def named(output: ContrastiveOutput, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return everything that is compared."""
    return {"loss": output.loss, **output.terms, **output.stats, **gradients}


def expected(
    kwargs: dict[str, Any], rows: list[int], columns: list[int], needs: tuple[str, ...], **how: Any
) -> dict[str, Tensor]:
    """Return what this rank must get, worked out in one process."""
    output, gradients = call(kwargs, needs, **how)
    ranks = dist.get_world_size()
    sizes = {"image": rows, "text": columns}
    mine = {name: ranks * part(g, sizes[name]) if name in sizes else g for name, g in gradients.items()}
    return named(output, mine)


def compare(
    kwargs: dict[str, Any],
    rows: list[int],
    columns: list[int],
    mesh: MeshShape,
    impl: str,
    needs: tuple[str, ...] = DIFFERENTIABLE,
) -> None:
    """Assert that the ranks get what one process gets: in float64 to 1e-12, else with twice its error at most."""
    truth = expected(in_float64(kwargs), rows, columns, needs, impl="eager")
    mine = part_of(kwargs, rows, columns)
    got = named(*call(mine, needs, impl=impl, group=dist.group.WORLD, mesh=mesh))
    again = named(*call(mine, needs, impl=impl, group=dist.group.WORLD, mesh=mesh))
    assert got.keys() == truth.keys()
    everyones = [torch.empty_like(got["loss"]) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, got["loss"].detach())
    assert len({float(loss) for loss in everyones}) == 1, f"the ranks disagree about the loss: {everyones}"
    one = None
    if kwargs["image"].dtype != torch.float64:
        one = expected(kwargs, rows, columns, needs, impl=impl)
    for name, exact in truth.items():
        assert torch.equal(got[name], again[name]), f"{name} differs when the call is repeated"
        allowed = EXACT if one is None else 2 * error(one[name], exact) + ULPS
        assert error(got[name], exact) <= allowed, f"{name}: {error(got[name], exact):.3g} > {allowed:.3g}"


def whole_batch(n: int, m: int, classes: int = 7, **others: Any) -> dict[str, Any]:
    """Return a call on a global batch, in which each image has a positive text and each text an image."""
    return problem(n, m, d=16, classes=classes, **others)


def meshes(ranks: int) -> Iterator[MeshShape]:
    """Yield every shape of a mesh of so many ranks."""
    yield from ((p, ranks // p) for p in range(1, ranks + 1) if ranks % p == 0)
    yield "ring"
