"""What the loss modules refuse when they are made: an option that another of them takes, a value out of its range.

A mistake in an option is the same at every call: nobody should have to wait for the first batch to learn of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from tracer import _checks, _mesh
from tracer.kernels.contrastive import Options

ALWAYS = {"ClipLoss": "softmax", "MPMNCELoss": "softmax", "SigLipLoss": "sigmoid"}  # their contrast


def options_of(loss: type[nn.Module]) -> list[str]:
    """Return the names that a constructor takes, and those of its base's where it passes others on."""
    names: list[str] = []
    for base in loss.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        names += [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def refuse_unknown(
    loss: type[nn.Module],
    given: Collection[str],
    losses: Sequence[type[nn.Module]],
    function: Callable[..., Any],
) -> None:
    """Raise TypeError for the first of the options that a loss does not take, and say who takes it.

    Args:
        loss: that is made.
        given: names of the options.
        losses: all of them.
        function: that takes the options of all, and more.
    """
    taken = options_of(loss)
    for option in given:
        if option in taken:
            continue
        takers = [other.__name__ for other in losses if option in options_of(other)]
        takers += [function.__name__] * (option in inspect.signature(function).parameters)
        if option in inspect.signature(loss.forward).parameters:
            remedy = "pass it in each call of the loss"
        elif option == "contrast":
            own = ALWAYS[loss.__name__]
            remedy = f"it is always {own!r}; SigLipLoss is 'sigmoid', and TracerLoss takes either"
        elif option in ("rank", "world_size"):
            remedy = "for several ranks pass group=torch.distributed.group.WORLD"
        elif option == "group":
            remedy = f"for several ranks pass rank and world_size; {_all(takers)} take a group"
        elif takers:
            remedy = f"{_all(takers)} {'takes' if len(takers) == 1 else 'take'} it"
        else:
            remedy = f"its options are {', '.join(taken)}"
        raise TypeError(f"{loss.__name__} has no option {option!r}: {remedy}")


def _all(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def check_options(
    caller: str,
    *,
    impl: str,
    mesh: _mesh.MeshShape,
    rank: int = 0,
    ranks: int | None = None,
    group: ProcessGroup | None = None,
    margin: float = 0.0,
    smoothing: float = 0.0,
    teacher_temperature: float = 1.0,
    weights: Mapping[str, float] | None = None,
    contrast: str = "softmax",
    directions: tuple[float, float] = (0.5, 0.5),
    ignore_index: int | None = None,
) -> None:
    """Refuse, in the name of ``caller``, what :func:`tracer.ops.contrastive_loss` would refuse at every call.

    Args:
        caller: name of the loss.
        rank: this process, where ``ranks`` is known.
        ranks: their number, as far as it is known; ``group`` knows it too.
        weights: by the names of the loss's options.
        impl, mesh, group, margin, smoothing, teacher_temperature, contrast, directions, ignore_index: the options.

    Raises:
        ValueError: one of them makes no sense; the message names it.
    """
    given = {"margin": margin, "smoothing": smoothing, "teacher_temperature": teacher_temperature}
    for name, number in {**given, **(weights or {})}.items():
        if number is None or isinstance(number, str):
            raise ValueError(f"{caller}: {name} must be a number, got {number!r}")
    _checks.check_numbers(margin, smoothing, teacher_temperature, dict(weights or {}), impl, caller)
    _checks.with_form(Options(margin, smoothing), contrast, directions, None, None, caller)
    _checks.check_ignore_index(ignore_index, caller)
    _mesh.refuse_no_group(group, caller)
    if ranks and ranks > 1 and not 0 <= rank < ranks:
        raise ValueError(f"{caller}: rank must lie in [0, world_size), got rank = {rank} of {ranks}")
    if isinstance(group, ProcessGroup):
        ranks = group.size()
    _mesh.check_shape(mesh, ranks if ranks and ranks > 1 else None, caller)
