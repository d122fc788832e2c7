"""Gathers of features that begin before the loss is called, and run while the towers compute."""

from __future__ import annotations

import time
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tracer._agreement import Sizes, agree
from tracer._checks import products_dtype
from tracer._collectives import arrived, start_gather
from tracer._mesh import Mesh, MeshShape, check_group, check_shape, mesh_of
from tracer.kernels.contrastive import Inputs


class _Agreed(NamedTuple):
    """What all ranks have agreed about the features whose gathers begin."""

    mesh: Mesh
    sizes: Sizes
    width: int  # D
    dtype: torch.dtype  # of the products


class Ahead:
    """Gathers that begin before :func:`tracer.ops.contrastive_loss` is called, for one call of it::

        with Ahead(group, len(pictures), len(tokens)) as ahead:
            text = text_tower(tokens)
            ahead.begin(text=text)
            image = image_tower(pictures)  # meanwhile the texts of the other ranks arrive
            loss = contrastive_loss(image, text, logit_scale, group=group, ahead=ahead).loss

    The loss and its gradients are the same as without it, bit for bit. In a group of one rank and with
    ``mesh="ring"`` nothing begins ahead. What began is not used with ``impl="eager"`` or ``directions=(0, 1)``,
    which gather other rows, and in a compiled loss. At the end of the block all gathers have ended.

    Args:
        group, mesh: as the loss will get them.
        images, texts: number of rows that this rank will pass to the loss.

    Attributes:
        begun: the gathers under way, by the names of the loss's arguments.
        waited: seconds that this rank has waited for the others to agree.
    """

    def __init__(self, group: ProcessGroup | None, images: int, texts: int, mesh: MeshShape = None) -> None:
        self._group, self._shape = check_group(group), mesh
        self._rows = {"image": images, "text": texts}
        self._agreed: _Agreed | None = None
        self._refusal: ValueError | None = None
        self._under_way: list[Tensor] = []
        self.begun: dict[str, Tensor] = {}
        self.waited = 0.0

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for x in self._under_way:
            arrived(x)
        self._under_way, self.begun = [], {}

    def begin(
        self,
        *,
        image: Tensor | None = None,
        text: Tensor | None = None,
        teacher_image: Tensor | None = None,
        teacher_text: Tensor | None = None,
    ) -> None:
        """Begin to gather features [N, D] or [M, D], and return before they have arrived.

        Pass what the loss will get, under autocast if it will be called there. All ranks make the same calls in
        one order. The first one exchanges four numbers a rank, and waits for them.

        Raises:
            ValueError: at the first call, where mesh, width or dtype differ between ranks or are refused. Features
                that do not fit later are refused by the loss. Either way every rank raises.
        """
        given = {"image": image, "text": text, "teacher_image": teacher_image, "teacher_text": teacher_text}
        features = {name: x.detach().to(products_dtype(x)) for name, x in given.items() if x is not None}
        if self._group is None or self._shape == "ring" or not features:
            return
        agreed = self._agreed = self._agreed or self._agree(self._group, features)
        for name, x in features.items():
            if refusal := self._misfit(name, x, agreed):
                # The other ranks gather all the same, so this one joins in; they learn of it from the loss.
                self._refusal = self._refusal or refusal
                x = x.new_zeros(self._rows[_side(name)], agreed.width, dtype=agreed.dtype)
            mesh, sizes = agreed.mesh, agreed.sizes
            if _side(name) == "image":
                gather = start_gather(x, [sizes.images[rank] for rank in mesh.row_ranks], mesh.row)
            else:
                gather = start_gather(x, [sizes.texts[rank] for rank in mesh.col_ranks], mesh.col)
            self._under_way.append(gather)
            self.begun[name] = gather

    def take(self) -> dict[str, Tensor]:
        """Return the gathers under way, by the names of the loss's arguments; they serve one call of the loss."""
        begun, self.begun = self.begun, {}
        return begun

    def refuse_misfit(self, inputs: Inputs, group: ProcessGroup, shape: MeshShape) -> None:
        """Raise ValueError where a call of the loss does not have the features whose gathers have begun."""
        if self._refusal:
            raise self._refusal
        if self._agreed is None:
            return
        if group is not self._group or shape != check_shape(self._shape, group.size()):
            raise ValueError(
                f"contrastive_loss: gathers began ahead with mesh={self._shape}, and the loss has mesh={shape} or "
                "another group: give both the same group and mesh"
            )
        for name in self.begun:
            x = getattr(inputs, name)
            if x is not None and (refusal := self._misfit(name, x, self._agreed)):
                raise refusal

    def _misfit(self, name: str, x: Tensor, agreed: _Agreed) -> ValueError | None:
        """Return what is wrong with features of this name, or None."""
        rows = self._rows[_side(name)]
        if x.shape == (rows, agreed.width) and x.dtype == agreed.dtype:
            return None
        return ValueError(
            f"contrastive_loss: {name} is {list(x.shape)} in {x.dtype}, but gathers ahead were agreed for "
            f"{[rows, agreed.width]} in {agreed.dtype}: begin with the features that the loss gets"
        )

    def _agree(self, group: ProcessGroup, features: dict[str, Tensor]) -> _Agreed:
        """Return what all ranks have in common, once it is known that they begin alike."""
        started = time.perf_counter()
        name, first = next(iter(features.items()))
        described: dict[str, object] = {}
        refusal: ValueError | None = None
        try:
            if first.ndim != 2:
                raise ValueError(f"contrastive_loss: {name} must be [N, D], got {list(first.shape)}")
            shape = check_shape(self._shape, group.size())
            described = {"mesh": shape, "D": first.shape[1], "dtype of the products": str(first.dtype)}
            described["ahead"] = tuple(features)
        except ValueError as error:
            refusal = error
        sizes = agree(group, self._rows["image"], self._rows["text"], described, refusal)
        self.waited += time.perf_counter() - started
        return _Agreed(mesh_of(group, shape), sizes, first.shape[1], first.dtype)


def _side(name: str) -> str:
    return name.removeprefix("teacher_")
