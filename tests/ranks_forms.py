"""More cases of tests/test_ranks.py: sigmoid, one direction and labels without a partner over several ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip.loss
import torch
import torch.distributed as dist
from loss_calls import OPTIONS, WEIGHTS, without_teacher
from ranks_batches import EXACT, call, compare, meshes, part_of, unevenly, whole_batch
from three_runs import error

from benchmarks.measure import allocated
from benchmarks.rank_worker import received
from tracer._mesh import MeshShape
from tracer.losses import SigLipLoss

BLOCKS_OF_A_RING = (
    20  # [n, D] in float32: 12 on 2 ranks, 15 on 4 and on 6; 17 where gloo lets go of some late
)


def pairwise(n: int, m: int, **others: Any) -> dict[str, Any]:
    """Return a call with a sigmoid of each pair."""
    dtype = others.pop("dtype", torch.float64)
    bias = torch.tensor(-4.0, dtype=torch.promote_types(dtype, torch.float32))
    kwargs = whole_batch(n, m, dtype=dtype, **others)
    return kwargs | {"contrast": "sigmoid", "logit_bias": bias, "margin": 0.1}


def sigmoid(mesh: MeshShape, impl: str) -> None:
    """SigLIP's loss, by labels and by place, with a rank that has no batch; any subset of gradients."""
    dtype = torch.float32 if impl == "triton" else torch.float64
    kwargs = without_teacher(pairwise(48, 66, dtype=dtype))
    compare(kwargs, unevenly(48), unevenly(66)[::-1], mesh, impl)
    kwargs = without_teacher(pairwise(50, 50, classes=0, dtype=dtype))
    sizes = unevenly(50, empty=dist.get_world_size() // 2)
    compare(kwargs, sizes, sizes, mesh, impl)
    compare(kwargs, sizes, sizes, mesh, impl, ("text", "logit_bias"))
    compare(kwargs, sizes, sizes, mesh, impl, ())


def sigmoid_with_all_terms(mesh: MeshShape, impl: str) -> None:
    """Labels without a partner, diagnostics, distillation: two walks, and softmaxes beside them."""
    kwargs = pairwise(48, 66) | WEIGHTS | {"stats": True, "teacher_logit_bias": -3.0, "ignore_index": -1}
    kwargs["labels"][5:9], kwargs["text_labels"][20:31] = -1, -1
    compare(kwargs, unevenly(48), unevenly(66)[::-1], mesh, impl)


def one_direction(mesh: MeshShape, impl: str) -> None:
    for directions in ((1, 0), (0, 1), (0.3, 0.9)):
        kwargs = whole_batch(48, 66, dtype=torch.float64) | OPTIONS["all"] | {"directions": directions}
        compare(kwargs, unevenly(48), unevenly(66, empty=0), mesh, impl)


def left_out(mesh: MeshShape, impl: str) -> None:
    """Hard negatives: all texts of a rank may be without a partner, and images too."""
    for form in ({"stats": True}, {"directions": (0, 1)}):
        kwargs = whole_batch(48, 66, dtype=torch.float64) | OPTIONS["all"] | {"ignore_index": -1} | form
        kwargs["labels"][:3], kwargs["text_labels"][60:], kwargs["text_labels"][7] = -1, -1, 99
        compare(kwargs, unevenly(48), unevenly(66), mesh, impl)


def sigmoid_bytes_received(mesh: MeshShape) -> None:
    """Texts and gradients alone, no statistics: a ring brings texts R − 1 times, and their gradients R times."""
    ranks, D = dist.get_world_size(), 512
    x = torch.randn(24, D, generator=torch.Generator().manual_seed(0))
    kwargs = {"image": x, "text": x, "logit_scale": torch.tensor(10.0), "logit_bias": torch.tensor(-10.0)}
    counted = received(partial(call, kwargs, group=dist.group.WORLD, mesh=mesh, contrast="sigmoid"))
    passes = 2 * ranks - 1 if mesh == "ring" else 2 * ranks * (1 / mesh[0] + 1 / mesh[1] - 2 / ranks)
    formula = 4 * 24 * D * passes
    assert abs(counted / formula - 1) < 0.005, (counted, formula)


def memory_of_a_ring(contrast: str) -> None:
    """Of the same batch of a rank it takes the same however many ranks there are: no rank gathers features."""
    n, D = 32, 2048
    x = torch.nn.functional.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(0)), dim=1)
    kwargs = {"image": x, "text": x.flip(1), "logit_scale": torch.tensor(10.0), "contrast": contrast}
    step = partial(call, kwargs, group=dist.group.WORLD, mesh="ring", impl="blocked")
    step()  # makes what stays
    blocks = allocated(step) / (4 * n * D)
    assert blocks < BLOCKS_OF_A_RING, blocks


def open_clips_sigmoid(dist_impl: str) -> None:
    """open_clip's own loss on the same ranks: the mean over the ranks, and gradients as an engine averages them.

    Features get the same gradients rank by rank, since open_clip sends those of texts back to their ranks.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    sizes = [5] * ranks
    mine = part_of(without_teacher(pairwise(sum(sizes), sum(sizes), classes=0)), sizes, sizes)
    names, got = ("image", "text", "logit_scale", "logit_bias"), []
    for made in (SigLipLoss, open_clip.loss.SigLipLoss):
        leaves = [mine[name].clone().requires_grad_() for name in names]
        loss = made(rank=rank, world_size=ranks, dist_impl=dist_impl)(*leaves)
        loss.backward()
        image, text, scale, bias = (x.grad for x in leaves)
        means = torch.stack([loss.detach(), scale, bias])
        dist.all_reduce(means)
        got.append((image, text, means / ranks))
    for ours, theirs in zip(*got, strict=True):
        assert error(ours, theirs) < EXACT


def cases(world_size: int) -> dict[str, Callable[[], None]]:
    """Return the cases of a world of ranks by name."""
    named: dict[str, Callable[[], None]] = {}
    everywhere = (sigmoid, one_direction, left_out, sigmoid_with_all_terms)
    for mesh in meshes(world_size):
        at = mesh if mesh == "ring" else f"{mesh[0]}x{mesh[1]}"
        for case in everywhere if world_size in (2, 4) else (sigmoid,):
            named[f"{at}-{case.__name__}-blocked"] = partial(case, mesh, "blocked")
        if world_size in (2, 4):
            named[f"{at}-sigmoid_bytes_received"] = partial(sigmoid_bytes_received, mesh)
    if world_size in (2, 4, 6):
        named |= {
            f"memory_of_a_ring-{form}": partial(memory_of_a_ring, form) for form in ("softmax", "sigmoid")
        }
    if world_size in (2, 3):  # two neighbours only among three
        for dist_impl in ("bidir", "shift", "reduce", "gather"):
            named[f"open_clips_sigmoid-{dist_impl}"] = partial(open_clips_sigmoid, dist_impl)
    if world_size == 2:
        named |= {f"{case.__name__}-eager": partial(case, None, "eager") for case in everywhere}
        named["1x2-sigmoid-triton"] = partial(sigmoid, (1, 2), "triton")
    return named
