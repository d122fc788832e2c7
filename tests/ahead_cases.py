"""The cases of tests/test_ahead.py: gathers that begin before the loss, at the loss itself and in the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import run_cases
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from loss_calls import OPTIONS, WEIGHTS
from ranks_batches import DIFFERENTIABLE, evenly, meshes, named, part_of, unevenly, whole_batch
from torch import Tensor

from tracer import _collectives
from tracer._mesh import MeshShape
from tracer.data.batches import Batch
from tracer.models.clip import load_clip
from tracer.ops import Ahead, contrastive_loss
from tracer.train.config import Config
from tracer.train.engine import full_weights
from tracer.train.loop import Trainer

FEATURES = ("teacher_image", "teacher_text", "text", "image")


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Yield the list of what happens: "gather" where one begins, "wait" where its result is needed."""
    events: list[str] = []
    gather, wait = _collectives._all_gather, functional.wait_tensor

    def gathering(x: Tensor, group: str) -> Tensor:
        events.append("gather")
        return gather(x, group)

    def waiting(x: Tensor) -> Tensor:
        events.append("wait")
        return wait(x)

    with (
        mock.patch.object(_collectives, "_all_gather", gathering),
        mock.patch.object(functional, "wait_tensor", waiting),
    ):
        yield events


# ----------------------------------------------------------------------------------------------------------
# The loss
# ----------------------------------------------------------------------------------------------------------


def call(kwargs: dict[str, Any], mesh: MeshShape, begin: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Return value and gradients, and what happened within the loss."""
    kwargs = dict(kwargs)
    leaves = {name: kwargs.pop(name).clone().requires_grad_() for name in DIFFERENTIABLE if name in kwargs}
    given = leaves | kwargs
    how = {"group": dist.group.WORLD, "mesh": mesh}
    with (
        recorded() as events,
        Ahead(dist.group.WORLD, len(given["image"]), len(given["text"]), mesh) as ahead,
    ):
        for names in (FEATURES[:2], FEATURES[2:]) if begin else ():
            ahead.begin(**{name: given[name] for name in names})
        assert "wait" not in events
        began = len(events)
        output = contrastive_loss(**given, **how, ahead=ahead)
    output.loss.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    return named(output, gradients), ["begun"] * began + events[began:]


def equal(mesh: MeshShape, autocast: bool, changes: dict[str, Any]) -> None:
    """Values and gradients are those without it, bit for bit; every gather takes place once."""
    n, m = 40, 52
    kwargs = whole_batch(n, m, dtype=torch.float32) | changes
    mine = part_of(kwargs, unevenly(n), unevenly(m)[::-1])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, events = call(mine, mesh, True)
        want, plain = call(mine, mesh, False)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    ahead, without = (sum(event in ("begun", "gather") for event in of) for of in (events, plain))
    of_features = 2 * (mesh[0] > 1) + 2 * (mesh[1] > 1) if isinstance(mesh, tuple) else 0
    assert events.count("begun") == of_features
    if changes.get("impl") == "eager" or changes.get("directions") == (0, 1):  # these gather other rows
        assert ahead == without + of_features
    elif changes.get("contrast") == "sigmoid":  # which gathers for the pairs and for the softmaxes
        assert ahead == without - of_features
    else:
        assert ahead == without


def refused(begin: Callable[[Ahead, dict[str, Any]], None], change: dict[str, Any], message: str) -> None:
    """The last rank does something else than the rest: all say the same, and can still talk."""
    mine = part_of(whole_batch(24, 24, dtype=torch.float32), evenly(24), evenly(24))
    if dist.get_rank() < dist.get_world_size() - 1:
        begin, change = alike, {}

    def together() -> None:
        with Ahead(dist.group.WORLD, 12, 12) as ahead:
            begin(ahead, mine)
            contrastive_loss(**{"group": dist.group.WORLD, "ahead": ahead} | mine | change)

    with pytest.raises(ValueError, match=message) as caught:
        together()
    said: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(said, str(caught.value).partition(" (said by")[0])
    assert len(set(said)) == 1, said
    call(mine, None, True)


def fewer(x: Tensor) -> Tensor:
    return x[:7]


def alike(ahead: Ahead, mine: dict[str, Any]) -> None:
    ahead.begin(teacher_text=mine["teacher_text"])
    ahead.begin(text=mine["text"])


def other_at_first(how: Callable[[Tensor], Tensor], ahead: Ahead, mine: dict[str, Any]) -> None:
    ahead.begin(teacher_text=how(mine["teacher_text"]))
    ahead.begin(text=mine["text"])


def other_later(how: Callable[[Tensor], Tensor], ahead: Ahead, mine: dict[str, Any]) -> None:
    ahead.begin(teacher_text=mine["teacher_text"])
    ahead.begin(text=how(mine["text"]))


def other_names(ahead: Ahead, mine: dict[str, Any]) -> None:
    ahead.begin(teacher_image=mine["teacher_image"])
    ahead.begin(text=mine["text"])


def none(_: Ahead, __: dict[str, Any]) -> None:
    """Begin nothing: the rank is in the loss while the others agree about what they begin."""


AGREED = r"gathers ahead were agreed for \[12, 16\] in torch.float32: begin with the features that"
REFUSALS: dict[str, tuple[Callable[[Ahead, dict[str, Any]], None], dict[str, Any], str]] = {
    "dtype": (
        partial(other_at_first, Tensor.double),
        {},
        r"dtype of the products is torch.float32 on rank 0",
    ),
    "width": (partial(other_at_first, lambda x: x[:, :8]), {}, "D is 16 on rank 0 but 8 on rank 1"),
    "no matrix": (partial(other_at_first, lambda x: x[0]), {}, r"teacher_text must be \[N, D\], got \[16\]"),
    "rows": (
        partial(other_at_first, fewer),
        {},
        rf"teacher_text is \[7, 16\] in torch.float32, but {AGREED}",
    ),
    "later dtype": (
        partial(other_later, Tensor.double),
        {},
        rf"text is \[12, 16\] in torch.float64, but {AGREED}",
    ),
    "later width": (partial(other_later, lambda x: x[:, :8]), {}, rf"text is \[12, 8\] in .*, but {AGREED}"),
    "names": (other_names, {}, r"ahead is \('teacher_text',\) on rank 0 but \('teacher_image',\) on rank 1"),
    "nothing": (none, {}, r"ahead is \('teacher_text',\) on rank 0 but \(\) on rank 1"),
    "left out": (alike, {"ahead": None}, r"ahead is \('teacher_text', 'text'\) on rank 0 but \(\) on rank 1"),
    "mesh": (alike, {"mesh": "ring"}, r"began ahead with mesh=None, and the loss has mesh=ring or another"),
}


def another_batch() -> None:
    """The loss gets fewer rows than were begun with, on all ranks."""
    mine = part_of(whole_batch(24, 24, dtype=torch.float32), evenly(24), evenly(24))
    with Ahead(dist.group.WORLD, 12, 12) as ahead:
        alike(ahead, mine)
        some = {name: x[:7] if isinstance(x, Tensor) and x.ndim else x for name, x in mine.items()}
        with pytest.raises(ValueError, match=rf"text is \[7, 16\] in torch.float32, but {AGREED}"):
            contrastive_loss(**some, group=dist.group.WORLD, ahead=ahead)
    call(mine, None, True)


def a_second_call() -> None:
    """What was gathered ahead serves one call: the next one gathers what it is given."""
    mine = part_of(whole_batch(24, 24, dtype=torch.float32), evenly(24), evenly(24))
    other = mine | {"text": mine["text"].flip(0)}
    with Ahead(dist.group.WORLD, 12, 12) as ahead:
        alike(ahead, mine)
        first = contrastive_loss(**mine, group=dist.group.WORLD, ahead=ahead).loss
        second = contrastive_loss(**other, group=dist.group.WORLD, ahead=ahead).loss
    assert torch.equal(first, contrastive_loss(**mine, group=dist.group.WORLD).loss)
    assert torch.equal(second, contrastive_loss(**other, group=dist.group.WORLD).loss)
    assert not torch.equal(first, second)


# ----------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> Config:
    return dataclasses.replace(run_cases.settings(), feature=1.0, precision="amp_bf16", **changes)


def trainer_of(config: Config) -> Trainer:
    return Trainer(config, load_clip(config.model, config.pretrained).model)


def batch(config: Config, step: int) -> Batch:
    """Return this rank's part of a batch of noise, in which some captions occur twice."""
    n, here = config.batch_size // dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(10 * step + here)
    image = torch.randn(n, 3, 32, 32, generator=generator)
    text = torch.randint(1, 1000, (n, 16), generator=generator)
    text[1] = text[0]
    numbers = torch.arange(n)
    return Batch(image=image, text=text, label=numbers % 3, index=numbers)


def steps(config: Config) -> tuple[list[dict[str, Any]], dict[str, Tensor], list[str]]:
    """Return the scalars and weights of two steps, and what happened in the second one before its loss."""
    trainer = trainer_of(config)
    # The first step makes groups, and the second one begins with gathering the teacher's weights.
    scalars = [trainer.step(1, [batch(config, 1)], False)]
    teacher = trainer.averages.teacher
    assert teacher is not None
    with recorded() as events:

        def says(what: str) -> Callable[..., None]:
            return lambda *_: events.append(what)

        for who, model in (("teacher's", teacher.module), ("student's", trainer.engine.module)):
            model.transformer.register_forward_pre_hook(says(f"{who} texts"))
            model.visual.register_forward_pre_hook(says(f"{who} images"))
        trainer.loss.register_forward_pre_hook(says("loss"))
        scalars.append(trainer.step(2, [batch(config, 2)], False))
    weights = full_weights(trainer.engine)
    trainer.engine.destroy()
    assert "wait" in events  # which can be seen
    for row in scalars:
        row.pop("step_seconds")
    return scalars, weights, events[: events.index("loss")]


TEACHER, TEXTS, IMAGES = ("teacher's texts", "teacher's images"), "student's texts", "student's images"
# Two ranks have a mesh of 2×1: only texts are gathered. Nobody waits before the loss.
IN_ONE_SHOT = [*TEACHER, "gather", TEXTS, "gather", IMAGES]
IN_MICRO_BATCHES = [*TEACHER, *TEACHER, "gather", TEXTS, IMAGES, TEXTS, IMAGES]


def loop(changes: dict[str, Any], order: list[str]) -> None:
    """Gathers begin as early as they can; the steps are those of a loop that gathers in the loss, bit for bit."""
    config = settings(lr=1e-3, warmup=0, **changes)
    got, weights, events = steps(config)
    assert events == order, events
    if config.zero_stage == 3:  # its values are compared with one process in run_cases.py
        return
    with mock.patch.object(Ahead, "begin"):
        want, others, events = steps(config)
    assert events == [event for event in order if event != "gather"]
    assert [row.keys() for row in got] == [row.keys() for row in want]
    for mine, without in zip(got, want, strict=True):
        assert all(float(value) == float(without[name]) for name, value in mine.items())
    assert all(torch.equal(x, others[name]) for name, x in weights.items())


def what_is_not_compared_is_not_gathered() -> None:
    """Without a term that compares all of the teacher's pairs, its features stay where they are."""
    trainer = trainer_of(settings(relational=0.0, interactive=0.0, cross=0.0))
    with mock.patch.object(Ahead, "begin", autospec=True, side_effect=Ahead.begin) as begin:
        for measure in (False, True):
            trainer.step(1 + measure, [batch(trainer.config, 1)], measure)
    trainer.engine.destroy()
    begun = [tuple(call.kwargs) for call in begin.call_args_list]
    assert begun == [("text",), ("teacher_image", "teacher_text"), ("text",)]


LOOPS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "stage3": ({"zero_stage": 3}, IN_ONE_SHOT),
    "distinct-captions": (
        {"zero_stage": 1, "micro_batch": 12, "adapters": True, "adapter_drop": 0.5},
        IN_ONE_SHOT,
    ),
    "micro-batches": ({"zero_stage": 2, "micro_batch": 3}, IN_MICRO_BATCHES),
}


def cases(world_size: int) -> dict[str, Callable[[], None]]:
    """Return the cases of a world: name → function that raises where something is wrong."""
    everything = OPTIONS["all"] | {"stats": True}
    table: dict[str, Callable[[], None]] = {}
    for mesh in meshes(world_size):
        for autocast in (False, True):
            table[f"equal-{mesh}{'-autocast' * autocast}"] = partial(equal, mesh, autocast, everything)
    for name, changes in {
        "eager": {"impl": "eager"},
        "one-way": {"directions": (1, 0)},
        "one-way-back": {"directions": (0, 1)},
        "sigmoid": WEIGHTS | {"contrast": "sigmoid", "logit_bias": torch.tensor(-2.0)},
    }.items():
        table[f"equal-{name}"] = partial(equal, (2, 1), False, WEIGHTS | changes)
    table |= {f"refused-{name}": partial(refused, *how) for name, how in REFUSALS.items()}
    table |= {"another-batch": another_batch, "a-second-call": a_second_call}
    table |= {f"loop-{name}": partial(loop, *how) for name, how in LOOPS.items()}
    return table | {"not-compared": what_is_not_compared_is_not_gathered}
