"""What teacher and student have in common, computed once for both: frozen lower blocks, or a frozen tower.

A teacher's frozen weights are the student's own tensors. As far as a tower is frozen from its input on, both
compute the same activations from the same pictures or captions. Within ``with shared:`` the model that comes
first computes them, in the student's way of computing, and the other takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from tracer.models.clip import draws
from tracer.models.freezing import chain_of, trained_batchnorm

TOWERS = ("image", "text")


class SharedPrefix:
    """Shares the frozen beginning of each tower between a student and its teacher, within ``with``.

    Outside it both compute by themselves. Nothing is shared of a tower whose blocks are not known, whose
    beginning trains, or draws random numbers in training, or has BatchNorm that is not locked.

    Args:
        student: open_clip model, frozen in part. The ``forward`` of shared blocks is replaced.
        teacher: its copy, whose frozen parameters are the student's own; None shares nothing.

    Attributes:
        shared: the number of blocks that each tower shares; a whole tower in one piece counts as one.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None) -> None:
        self._chains: list[_Chain] = []
        self.shared = dict.fromkeys(TOWERS, 0)
        for which in TOWERS:
            pairs = _common(student, teacher, which) if teacher is not None else []
            self.shared[which] = len(pairs)
            if pairs:
                self._chains.append(_Chain(pairs))

    def __enter__(self) -> SharedPrefix:
        """Share from here on."""
        for chain in self._chains:
            chain.begin()
        return self

    def __exit__(self, *_: object) -> None:
        """Share no longer, and forget the activations."""
        for chain in self._chains:
            chain.end()


class _Chain:
    """Blocks that follow one another, as the student and the teacher have them."""

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        self._on = False
        self._kept: tuple[torch.Size, torch.dtype, Any] | None = None  # of the input, and the output
        self._blocks: list[Callable[..., Any]] = [student.forward for student, _ in pairs]
        for position, pair in enumerate(pairs):
            for module in pair:
                module.forward = self._in_place_of(module.forward, first=position == 0)

    def begin(self) -> None:
        self._on = True

    def end(self) -> None:
        self._on, self._kept = False, None

    def _in_place_of(self, forward: Callable[..., Any], first: bool) -> Callable[..., Any]:
        def shared(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return forward(x, *args, **kwargs)
            return self._all(x, *args, **kwargs) if first else x  # the first block has done the work of all

        return shared

    def _all(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the last block returns, computed without gradients unless it is there already."""
        if self._kept is None or self._kept[:2] != (x.shape, x.dtype):
            output: Any = x
            with torch.no_grad():
                for block in self._blocks:
                    output = block(output, *args, **kwargs)
            self._kept = x.shape, x.dtype, output
        return self._kept[2]


def _common(student: nn.Module, teacher: nn.Module, which: str) -> list[tuple[nn.Module, nn.Module]]:
    """Return the blocks of a tower that both models may share, from its input on, as pairs."""
    chain = chain_of(student, which)
    if chain is None:
        return []
    owned = [(student.get_parameter(name), teacher.get_parameter(name)) for name in chain.before]
    if not all(_is_common(*pair) for pair in owned):
        return []
    pairs = [(student.get_submodule(path), teacher.get_submodule(path)) for path in chain.paths]
    return list(takewhile(lambda pair: _may_share(*pair), pairs))


def _is_common(mine: nn.Parameter, others: nn.Parameter) -> bool:
    return mine is others and not mine.requires_grad


def _may_share(student: nn.Module, teacher: nn.Module) -> bool:
    both = zip(student.parameters(), teacher.parameters(), strict=True)
    random = any(draws(module) for module in student.modules())
    return not random and trained_batchnorm(student) is None and all(_is_common(*pair) for pair in both)
