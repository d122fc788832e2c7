"""The cases of tests/test_ranks.py: the loss over the batches of several ranks, against one process.

:func:`cases` names them. All ranks know the whole batch, take their part of it, and compare what they get with the
single process's result on the concatenation: values as they are, features' gradients times the number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import pytest
import ranks_forms
import torch
import torch.distributed as dist
from loss_calls import OPTIONS, WEIGHTS, without_teacher
from ranks_batches import (
    EXACT,
    call,
    compare,
    evenly,
    expected,
    meshes,
    named,
    part,
    part_of,
    unevenly,
    whole_batch,
)
from three_runs import error
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.rank_worker import products_taken, received
from tracer import _rectangle
from tracer._mesh import MeshShape, default_shape, mesh_of
from tracer.kernels.contrastive import Needs
from tracer.losses import ClipLoss, MPMNCELoss, SigLipLoss, TracerLoss
from tracer.ops import contrastive_loss

# ----------------------------------------------------------------------------------------------------------
# Values and gradients
# ----------------------------------------------------------------------------------------------------------


def everything(mesh: MeshShape, impl: str) -> None:
    """All terms, labels, margin, smoothing, diagnostics, M ≠ N, uneven batches."""
    n, m = 48, 66
    dtype = torch.float32 if impl == "triton" else torch.float64
    kwargs = whole_batch(n, m, dtype=dtype) | OPTIONS["all"] | {"stats": True}
    compare(kwargs, unevenly(n), unevenly(m)[::-1], mesh, impl)


def plain_clip(mesh: MeshShape, impl: str) -> None:
    """The CLIP loss without labels: pairs belong together by their place in the global batch."""
    dtype = torch.float32 if impl == "triton" else torch.float64
    kwargs = without_teacher(whole_batch(48, 48, classes=0, dtype=dtype))
    compare(kwargs, evenly(48), evenly(48), mesh, impl)


def uneven_pairs(mesh: MeshShape, impl: str) -> None:
    """Without labels, with a rank that has no batch; distillation and diagnostics."""
    kwargs = whole_batch(50, 50, classes=0, dtype=torch.float64) | WEIGHTS | {"stats": True}
    sizes = unevenly(50, empty=dist.get_world_size() // 2)
    compare(kwargs, sizes, sizes, mesh, impl)


def no_texts_on_a_rank(mesh: MeshShape, impl: str) -> None:
    kwargs = without_teacher(whole_batch(36, 42)) | {"margin": 0.1, "smoothing": 0.1}
    compare(kwargs, unevenly(36), unevenly(42, empty=0), mesh, impl)


def in_float32(mesh: MeshShape, impl: str) -> None:
    for seed in range(3):
        kwargs = whole_batch(60, 60, dtype=torch.float32, seed=seed) | OPTIONS["all"]
        compare(kwargs, evenly(60), evenly(60), mesh, impl)


def wild_logits(mesh: MeshShape, impl: str) -> None:
    """Logits of ±1e4, where no constant can be subtracted before the exponentials."""
    kwargs = whole_batch(48, 48, scale=1e4) | WEIGHTS
    compare(kwargs, evenly(48), evenly(48), mesh, impl)


def some_gradients(mesh: MeshShape, impl: str) -> None:
    for needs in ((), ("image",), ("text",), ("logit_scale",), ("text", "logit_scale")):
        kwargs = whole_batch(24, 24, dtype=torch.float64) | OPTIONS["all"]
        compare(kwargs, evenly(24), evenly(24), mesh, impl, needs)


def no_grad(mesh: MeshShape, impl: str) -> None:
    """Without a gradient to come, the final statistics of rows and columns stay at home."""
    mine = part_of(whole_batch(24, 24), evenly(24), evenly(24))
    how = {"impl": impl, "group": dist.group.WORLD, "mesh": mesh}
    with torch.no_grad():
        output, _ = call(mine, (), **how)
        one, _ = call(whole_batch(24, 24), (), impl="eager")
    assert output.loss.grad_fn is None
    assert error(output.loss, one.loss) < EXACT
    with mock.patch.object(_rectangle, "saved_of", side_effect=AssertionError("statistics travel")):
        with torch.no_grad():
            call(mine, (), **how)
        call(mine, (), **how)  # whose inputs ask for no gradient
        if mesh != "ring":
            with pytest.raises(AssertionError, match="statistics travel"):
                call(mine, ("text",), **how)


def in_bfloat16(mesh: MeshShape, impl: str) -> None:
    """Against float64, the error is at most twice that of one process, whose features are in bfloat16 too."""
    kwargs = whole_batch(60, 60, dtype=torch.bfloat16) | OPTIONS["all"] | {"feature": 0.0}
    compare(kwargs, evenly(60), evenly(60), mesh, impl)


def missing_positive(mesh: MeshShape, impl: str) -> None:
    """A row whose label occurs on no text of any rank makes the loss NaN; a label of another rank does not."""
    kwargs = without_teacher(whole_batch(24, 24))
    mine = part_of(kwargs, evenly(24), evenly(24))
    how = {"impl": impl, "group": dist.group.WORLD, "mesh": mesh}
    assert bool(contrastive_loss(**mine, **how).loss.isfinite())
    if dist.get_rank() == 0:
        mine["labels"] = mine["labels"].clone()
        mine["labels"][0] = 999
    assert bool(contrastive_loss(**mine, **how).loss.isnan())


def autocast(mesh: MeshShape, impl: str) -> None:
    kwargs = whole_batch(48, 48, dtype=torch.float32) | OPTIONS["all"] | {"feature": 0.0}
    with torch.autocast("cpu", torch.bfloat16):
        got = named(
            *call(part_of(kwargs, evenly(48), evenly(48)), impl=impl, group=dist.group.WORLD, mesh=mesh)
        )
        one = expected(kwargs, evenly(48), evenly(48), Needs._fields, impl=impl)
    for name, value in one.items():
        assert got[name].dtype == value.dtype
        assert error(got[name], value) < 2e-2, name


# ----------------------------------------------------------------------------------------------------------
# Engines, compilers, modules
# ----------------------------------------------------------------------------------------------------------


class Towers(nn.Module):
    """Two small towers and a logit scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(12, 16).double(), nn.Linear(9, 16).double()
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = (self.image(image), self.text(text))
        u, v = (nn.functional.normalize(x, dim=-1) for x in features)
        return u, v, self.logit_scale.exp()


def under_ddp() -> None:
    """An engine that averages gradients gets the gradient of one process, which is what the factor R is for."""
    ranks = dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(8 * ranks, 12, generator=generator, dtype=torch.float64)
    text = torch.randn(8 * ranks, 9, generator=generator, dtype=torch.float64)
    for make in (ClipLoss, SigLipLoss):
        one, ours = Towers(), DistributedDataParallel(Towers())
        make()(*one(image, text), logit_bias=-2.0).backward()
        loss = make(rank=dist.get_rank(), world_size=ranks)
        mine = part(image, evenly(len(image))), part(text, evenly(len(text)))
        loss(*ours(*mine), logit_bias=-2.0).backward()
        for (name, want), got in zip(one.named_parameters(), ours.parameters(), strict=True):
            assert error(got.grad, want.grad) < EXACT, name


def modules() -> None:
    """The drop-in modules give the loss of the concatenated batch."""
    ranks, kwargs = dist.get_world_size(), whole_batch(24, 24, dtype=torch.float64)
    mine, sizes = part_of(kwargs, evenly(24), evenly(24)), evenly(24)
    who = {"rank": dist.get_rank(), "world_size": ranks}
    for make in (ClipLoss, MPMNCELoss, SigLipLoss):
        arguments = [[of[name] for name in ("image", "text", "logit_scale")] for of in (kwargs, mine)]
        labels = [kwargs["labels"], mine["labels"]]
        want = make()(*arguments[0], logit_bias=-2.0, labels=labels[0])
        got = make(**who)(*arguments[1], logit_bias=-2.0, labels=labels[1])
        assert error(got, want) < EXACT
    calls = [
        (of["image"], of["text"], of["logit_scale"], (of["teacher_image"], of["teacher_text"], 22.0))
        for of in (kwargs, mine)
    ]
    projections = (torch.eye(16, dtype=torch.float64), torch.eye(16, dtype=torch.float64))
    for mesh in (None, "ring"):
        want = TracerLoss()(*calls[0], projections=projections, stats=True)
        got = TracerLoss(group=dist.group.WORLD, mesh=mesh)(*calls[1], projections=projections, stats=True)
        for name, value in named(want, {}).items():
            assert error(named(got, {})[name], value) < EXACT, name
    assert sizes == evenly(24)


def no_teacher_on_a_rank() -> None:
    """What a module refuses on one rank, every rank raises, and all can talk afterwards."""
    mine = part_of(whole_batch(24, 24), evenly(24), evenly(24))
    student, teacher = (
        [mine[f"{who}{x}"] for x in ("image", "text", "logit_scale")] for who in ("", "teacher_")
    )
    loss = TracerLoss(group=dist.group.WORLD, projection_product=0)
    last = dist.get_rank() == dist.get_world_size() - 1
    with pytest.raises(ValueError, match=r"TracerLoss: relational, .* need a teacher: pass teacher="):
        loss(*student, teacher=None if last else teacher)
    with pytest.raises(ValueError, match=r"TracerLoss: teacher must be .* got a list of 2"):
        loss(*student, teacher=teacher[:2] if last else teacher)
    plain_clip(None, "blocked")


def wrong_rank() -> None:
    ranks = dist.get_world_size()
    x = torch.eye(4)
    with pytest.raises(ValueError, match=rf"ClipLoss: world_size = {ranks + 1}, but .* has {ranks}"):
        ClipLoss(rank=0, world_size=ranks + 1)(x, x, 1.0)
    with pytest.raises(ValueError, match="ClipLoss: rank = "):
        ClipLoss(rank=(dist.get_rank() + 1) % ranks, world_size=ranks)(x, x, 1.0)
    with pytest.raises(ValueError, match=r"ClipLoss: rank = 0, but this process is rank [1-9]"):
        ClipLoss(rank=0, world_size=ranks)(x, x, 1.0)  # which is right on one of them


def hosts_of_unequal_size() -> None:
    """Each rank knows the size of its own host alone; all find the same mesh."""
    ranks, here = dist.get_world_size(), dist.get_rank()
    group = dist.new_group(range(ranks))
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="1" if here == 0 else str(ranks - 1)):
        mesh = mesh_of(group, None)
    assert (mesh.rows, mesh.cols) == default_shape(ranks, ranks)
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="1"):
        mesh = mesh_of(dist.new_group(range(ranks)), None)
    assert (mesh.rows, mesh.cols) == (ranks, 1)


def subgroups_give_up_when_their_group_does() -> None:
    group = dist.new_group(range(dist.get_world_size()), timeout=timedelta(seconds=47))
    mesh = mesh_of(group, (2, 2))
    for name in (mesh.row, mesh.col):
        made = dist.distributed_c10d._resolve_process_group(name)
        assert made._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=47)


def compiled(mesh: MeshShape) -> None:
    """One graph, forward and backward, with the collectives in it."""
    torch._dynamo.reset()
    kwargs = whole_batch(24, 24, dtype=torch.float32) | OPTIONS["all"]
    mine = part_of(kwargs, evenly(24), evenly(24))
    leaves = {name: mine.pop(name).clone().requires_grad_() for name in Needs._fields}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled_loss(image, text, logit_scale):
        return contrastive_loss(image, text, logit_scale, **mine, group=dist.group.WORLD, mesh=mesh).loss

    (1.5 * compiled_loss(*leaves.values())).backward()
    _, gradients = call(part_of(kwargs, evenly(24), evenly(24)), group=dist.group.WORLD, mesh=mesh)
    for name, value in gradients.items():
        torch.testing.assert_close(leaves[name].grad, value, rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------
# Work and bytes
# ----------------------------------------------------------------------------------------------------------


def bytes_received(mesh: MeshShape, teacher: bool) -> None:
    """In float32, features forward (twice with a teacher) and gradients backward, times g = 1/P + 1/Q − 2/R.

    In a ring each block of texts with its labels passes by twice, forward and backward, the second time with five
    final statistics. Its own statistics, in float64, and its gradient follow one step behind and come home.
    """
    ranks = dist.get_world_size()
    N, D = 24 * ranks, 512
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, D, generator=generator)
    mine = {"image": x, "text": x, "logit_scale": torch.tensor(10.0)}
    if teacher:
        mine |= {"teacher_image": x, "teacher_text": x} | WEIGHTS | {"feature": 0.0}
    counted = received(partial(call, mine, group=dist.group.WORLD, mesh=mesh))
    copies, statistics = (2, 8) if teacher else (1, 3)
    if mesh == "ring":
        passing = 2 * (4 * copies * D + 8) + 4 * 5
        formula = N / ranks * ((ranks - 1) * passing + ranks * (8 * statistics + 4 * D))
    else:
        assert isinstance(mesh, tuple)
        g = 1 / mesh[0] + 1 / mesh[1] - 2 / ranks
        formula = 4 * N * g * (copies * D + D + statistics + 5)
    assert abs(counted / formula - 1) < 0.01, (counted, formula)


def products_of_the_rectangle(mesh: tuple[int, int]) -> None:
    """The CLIP loss takes 4 products, the whole objective 12, over N·M/R logits: each pair is computed once."""
    ranks = dist.get_world_size()
    whole = whole_batch(24 * ranks, 24 * ranks, classes=0)
    mine = part_of(whole, evenly(24 * ranks), evenly(24 * ranks)) | WEIGHTS
    unit = 2 * 24 * 24 * ranks * mine["image"].shape[1]
    plain = {name: mine[name] for name in ("image", "text", "logit_scale")}
    for kwargs, units in ((plain, 4), (mine, 12)):
        taken = products_taken(partial(call, kwargs, group=dist.group.WORLD, mesh=mesh, impl="blocked"))
        assert taken == units * unit, taken / unit


# ----------------------------------------------------------------------------------------------------------
# Refusals: one line, the same on every rank, and nobody waits
# ----------------------------------------------------------------------------------------------------------


def refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    """The last rank makes another call than the rest; afterwards all ranks can still talk."""
    mine = part_of(whole_batch(24, 24, dtype=torch.float32), evenly(24), evenly(24))
    if dist.get_rank() == dist.get_world_size() - 1:
        change(mine)
    with pytest.raises(ValueError, match=message) as caught:
        contrastive_loss(**mine, group=dist.group.WORLD)
    said: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(
        said, str(caught.value).removesuffix(f" (said by rank {dist.get_world_size() - 1})")
    )
    assert len(set(said)) == 1, said
    assert "\n" not in said[0]
    plain_clip(None, "blocked")


def halves(names: tuple[str, ...], dtype: torch.dtype) -> Callable[[dict[str, Any]], None]:
    return lambda mine: mine.update({name: mine[name].to(dtype) for name in names})


def narrower(mine: dict[str, Any]) -> None:
    mine.update({name: mine[name][:, :8] for name in ("image", "text", "teacher_image", "teacher_text")})


FEATURES = ("image", "text", "teacher_image", "teacher_text")
REFUSALS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "margin": (lambda mine: mine.update(margin=0.1), r"margin is 0.0 on rank 0 but 0.1 on rank \d"),
    "weight": (lambda mine: mine.update(cross=0.5), r"cross is 0.0 on rank 0 but 0.5 on rank \d"),
    "stats": (lambda mine: mine.update(stats=True), r"stats is False on rank 0 but True"),
    "contrast": (lambda mine: mine.update(contrast="sigmoid"), r"contrast is softmax on rank 0 but sigmoid"),
    "directions": (
        lambda mine: mine.update(directions=(1, 0)),
        r"directions is \(0.5, 0.5\) on rank 0 but \(1",
    ),
    "ignore_index": (lambda mine: mine.update(ignore_index=-1), r"ignore_index is None on rank 0 but -1"),
    "one rank's contrast": (lambda mine: mine.update(contrast="hinge"), r"unknown contrast 'hinge'"),
    "impl": (lambda mine: mine.update(impl="eager"), r"impl is blocked on rank 0 but eager"),
    "mesh": (lambda mine: mine.update(mesh="ring"), r"mesh is None on rank 0 but ring"),
    "dtype": (halves(FEATURES, torch.float64), r"dtype is torch.float32 on rank 0 but torch.float64"),
    "width": (narrower, r"D is 16 on rank 0 but 8 on rank \d"),
    "gradient": (
        lambda mine: mine["text"].requires_grad_(),
        r"text.requires_grad is False on rank 0 but True",
    ),
    "labels": (
        lambda mine: mine.update(labels=None, text_labels=None),
        r"labels is a tensor on rank 0 but None on rank \d",
    ),
    "teacher": (
        lambda mine: mine.update(teacher_image=None, teacher_text=None),
        r"teacher_image is a tensor on rank 0 but None",
    ),
    "one rank's shape": (
        lambda mine: mine.update(image=mine["image"][0]),
        r"image must be \[rows, D\], got shape",
    ),
    "one rank's number": (lambda mine: mine.update(smoothing=2.0), r"smoothing must lie in \[0, 1\)"),
    "one rank's mesh": (lambda mine: mine.update(mesh=(5, 5)), r"mesh must be None, 'ring' or \(P, Q\)"),
}


def other_errors_reach_all() -> None:
    """What only Python itself refuses, on one rank, is raised there, and does not leave the others waiting."""
    mine = part_of(whole_batch(24, 24), evenly(24), evenly(24))
    last = dist.get_world_size() - 1
    if dist.get_rank() == last:
        mine["image"] = "cats"
    with pytest.raises(
        AttributeError if dist.get_rank() == last else ValueError, match="'str' object has no"
    ):
        contrastive_loss(**mine, group=dist.group.WORLD)
    mine = part_of(whole_batch(24, 24), evenly(24), evenly(24))
    if dist.get_rank() == last:
        mine["margin"] = None
    with pytest.raises(TypeError if dist.get_rank() == last else ValueError, match="NoneType"):
        contrastive_loss(**mine, group=dist.group.WORLD)
    plain_clip(None, "blocked")


def nobody_has_a_batch() -> None:
    empty = torch.empty(0, 16)
    with pytest.raises(ValueError, match="image is empty on every rank"):
        contrastive_loss(empty, empty, 10.0, group=dist.group.WORLD)


# ----------------------------------------------------------------------------------------------------------


SINGLE = (plain_clip, no_texts_on_a_rank, wild_logits)  # what one mesh of each kind shows


def cases(world_size: int) -> dict[str, Callable[[], None]]:
    """Return the cases of a world of ranks by name."""
    named: dict[str, Callable[[], None]] = {}
    few = world_size in (3, 6)  # as many processes as that are slow, and show what uneven meshes alone can
    for mesh in [(2, 3), "ring"] if world_size == 6 else meshes(world_size):
        at = mesh if mesh == "ring" else f"{mesh[0]}x{mesh[1]}"
        for case in (everything, uneven_pairs, in_float32, *(() if few else SINGLE)):
            named[f"{at}-{case.__name__}-blocked"] = partial(case, mesh, "blocked")
        if world_size == 2 or (world_size == 4 and mesh in ((2, 2), "ring")):
            for case in (everything, plain_clip):
                named[f"{at}-{case.__name__}-triton"] = partial(case, mesh, "triton")
        if world_size in (2, 4):
            for case in (some_gradients, no_grad, missing_positive, autocast, in_bfloat16):
                named[f"{at}-{case.__name__}-blocked"] = partial(case, mesh, "blocked")
        if world_size in (2, 4):
            named[f"{at}-bytes_received"] = partial(bytes_received, mesh, False)
            named[f"{at}-bytes_received-teacher"] = partial(bytes_received, mesh, True)
        if mesh != "ring" and world_size in (2, 4, 6):
            named[f"{at}-products_of_the_rectangle"] = partial(products_of_the_rectangle, mesh)
    for case in (everything,) if few else (everything, *SINGLE[:2], uneven_pairs, in_float32, some_gradients):
        named[f"{case.__name__}-eager"] = partial(case, None, "eager")
    named |= {
        case.__name__: case
        for case in (
            under_ddp,
            modules,
            no_teacher_on_a_rank,
            wrong_rank,
            hosts_of_unequal_size,
            nobody_has_a_batch,
            other_errors_reach_all,
        )
    }
    if world_size == 4:
        named["subgroups_give_up_when_their_group_does"] = subgroups_give_up_when_their_group_does
    if world_size == 2:
        named |= {f"compiled-{mesh}": partial(compiled, mesh) for mesh in ((2, 1), (1, 2), "ring")}
    if world_size == 2:
        named |= {f"refused-{name}": partial(refused, *how) for name, how in REFUSALS.items()}
    return named | ranks_forms.cases(world_size)
