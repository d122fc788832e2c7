"""The loader ``torch``: threads of this process read, decode, crop, resize and normalise into the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tracer.data.ahead import Ahead
from tracer.data.changed import changed
from tracer.data.config import LoadingSettings
from tracer.data.decode import Normalise, evaluation, training
from tracer.data.index import Index
from tracer.data.plan import Plan, Work
from tracer.errors import UserError
from tracer.models.picture_format import PictureFormat

COMPARED = 16  # pictures by which the effect of --jpeg scaled is measured


def pictures(plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the batches of a plan: ``(image, rows)``; see :func:`~tracer.data.loader.load`."""
    side, normalise = plan.picture_format.size, Normalise(plan.picture_format)

    def blank() -> np.ndarray:
        return np.zeros((3, side, side), np.uint8)

    def begin(number: int) -> tuple[Work, np.ndarray]:
        work = plan.work(number)
        return work, np.empty((len(work), 3, side, side), np.float32)

    def fill(batch: tuple[Work, np.ndarray], place: int) -> int:
        work, out = batch
        row, levels = plan.first_good(work, place, lambda row: _levels(plan, work, place, row), blank)
        if (drawn := work.changes) is not None:
            factors = None if drawn.factors is None else drawn.factors[place]
            levels = changed(levels, bool(drawn.flipped[place]), factors)
        normalise(levels, out[place])
        return row

    batches = Ahead(map(begin, plan.numbers), lambda batch: len(batch[0]), fill, plan.settings.workers)
    for (_, out), rows in batches:
        yield torch.from_numpy(out).to(plan.device, non_blocking=True), torch.tensor(rows)


def _levels(plan: Plan, work: Work, place: int, row: int) -> np.ndarray:
    """Return what the model sees of a picture, [3, S, S] uint8."""
    picture, wanted, settings = plan.read(row), plan.picture_format, plan.settings
    scaled = settings.jpeg == "scaled"
    if work.crops is None:
        return evaluation(picture, wanted, settings.exif, scaled)
    return training(picture, work.crop(place), wanted, settings.exif, scaled)


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
            shown.append(np.stack([_levels(plan, plan.work(0), 0, row) for row in rows.tolist()]))
        except (UserError, OSError) as error:
            return f"the effect of --jpeg scaled was not measured: {error}"
    difference = np.abs(shown[0].astype(int) - shown[1])
    changed = int(difference.any((1, 2, 3)).sum())
    return (
        f"--jpeg scaled changes {changed} of the first {len(rows)} pictures, by {difference.mean():.2f} of 255 "
        f"levels on average and {difference.max():.0f} at most"
    )
