"""The loader ``torch``: threads of this process read, decode, crop, resize and normalise into the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tracer.data.ahead import Ahead
from tracer.data.changed import changed
from tracer.data.config import LoadingSettings
from tracer.data.decode import Normalise, evaluation, training
from tracer.data.header import PNG
from tracer.data.index import Index
from tracer.data.picture import Picture
from tracer.data.plan import Plan, Work
from tracer.data.png import Filtered, inflated, unfiltered
from tracer.errors import UserError
from tracer.models.picture_format import PictureFormat
from tracer.words import counted

TOGETHER = 1 << 16  # levels that are normalised in one piece: of a few small pictures, or of one large one
COMPARED = 16  # pictures by which the effect of --jpeg scaled is measured


def pictures(plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the batches of a plan: ``(image, rows)``; see :func:`~tracer.data.loader.load`."""
    side, normalise = plan.picture_format.size, Normalise(plan.picture_format)

    def blank() -> np.ndarray:
        return np.zeros((3, side, side), np.uint8)

    def begin(number: int) -> tuple[Work, np.ndarray]:
        work = plan.work(number)
        return work, np.empty((len(work), 3, side, side), np.float32)

    def fill(batch: tuple[Work, np.ndarray], places: range) -> list[int]:
        work, out = batch
        rows: list[int] = []
        together = max(1, TOGETHER // out[0].size)
        for some in (places[n : n + together] for n in range(0, len(places), together)):
            numbers, levels = _shown_together(plan, work, some, blank)
            normalise(
                [_changed(work, place, each) for place, each in zip(some, levels, strict=True)],
                out[some.start : some.stop],
            )
            rows += numbers
        return rows

    batches = Ahead(map(begin, plan.numbers), lambda batch: len(batch[0]), fill, plan.settings.workers)
    for (_, out), rows in batches:
        yield torch.from_numpy(out).to(plan.device, non_blocking=True), torch.tensor(rows)


def _shown_together(
    plan: Plan, work: Work, places: range, blank: Callable[[], np.ndarray]
) -> tuple[Sequence[int], list[np.ndarray]]:
    """Return numbers and levels of some pictures of a batch, or of those that stand in; see :func:`_shown`.

    Small PNG files are unfiltered together, when whatever may fail is done.
    """

    def load(place: int, row: int) -> np.ndarray | Filtered:
        picture = plan.read(row)
        if picture.content is not None and picture.content[:8] == PNG:
            small = inflated(picture.content)
            if small is not None:
                return small
        return _shown(plan, work, place, picture)

    rows, loaded = zip(*(plan.first_good(work, n, partial(load, n), blank) for n in places), strict=True)
    small = {n: each for n, each in zip(places, loaded, strict=True) if isinstance(each, Filtered)}
    pixels = dict(zip(small, unfiltered(list(small.values())), strict=True))

    def shown(place: int, each: np.ndarray | Filtered) -> np.ndarray:
        if not isinstance(each, Filtered):
            return each
        return _shown(plan, work, place, Picture((each.height, each.width), pixels=pixels[place]))

    return rows, [shown(place, each) for place, each in zip(places, loaded, strict=True)]


def _shown(plan: Plan, work: Work, place: int, picture: Picture) -> np.ndarray:
    """Return what the model sees of a picture, [3, S, S] uint8."""
    wanted, settings = plan.picture_format, plan.settings
    scaled = settings.jpeg == "scaled"
    if work.crops is None:
        return evaluation(picture, wanted, settings.exif, scaled)
    return training(picture, work.crop(place), wanted, settings.exif, scaled)


def _changed(work: Work, place: int, levels: np.ndarray) -> np.ndarray:
    """Return levels mirrored and with other colours, as the batch says."""
    if (drawn := work.changes) is None:
        return levels
    return changed(
        levels, bool(drawn.flipped[place]), None if drawn.factors is None else drawn.factors[place]
    )


def effect_of_scaling(index: Index, picture_format: PictureFormat, settings: LoadingSettings) -> str:
    """Say by how many levels ``--jpeg scaled`` changes the first pictures of a data set, seen as in evaluation."""
    rows = np.arange(min(COMPARED, len(index)))
    shown = []
    for jpeg in ("exact", "scaled"):
        plan = Plan(
            index,
            picture_format,
            dataclasses.replace(settings, jpeg=jpeg),
            lambda number: Work(number, rows),
            range(1),
            len(rows),
        )
        try:
            shown.append(np.stack([_shown(plan, plan.work(0), 0, plan.read(row)) for row in rows.tolist()]))
        except (UserError, OSError) as error:
            return f"the effect of --jpeg scaled was not measured: {error}"
    difference = np.abs(shown[0].astype(int) - shown[1])
    changed = int(difference.any((1, 2, 3)).sum())
    return (
        f"--jpeg scaled changes {changed} of the first {counted(len(rows), 'picture')}, by "
        f"{difference.mean():.2f} of 255 levels on average and {difference.max():.0f} at most"
    )
