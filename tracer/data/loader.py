"""Decoded pictures batch by batch: which loader decodes them, and why."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from tracer.data.config import LoadingSettings
from tracer.data.index import Index
from tracer.data.names import note
from tracer.data.plan import Plan
from tracer.errors import UserError
from tracer.models.picture_format import PictureFormat
from tracer.words import counted


def load(plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the batches of a plan: ``(image, rows)``.

    ``image`` [n, 3, S, S] float32 on the plan's device is normalised as its picture format says; ``rows`` [n]
    int64 on the CPU holds the numbers of the pictures in the index.

    Raises:
        UserError: DALI is asked for and missing, or pictures cannot be decoded; see :class:`Plan`.
    """
    if not plan.numbers:
        return iter(())
    name, _ = choose(plan.settings, plan.device)
    if name == "dali":
        from tracer.data.dali import Pictures

        return iter(Pictures(plan))
    from tracer.data.threads import pictures

    return pictures(plan)


def choose(settings: LoadingSettings, device: torch.device) -> tuple[str, str]:
    """Return the loader that ``settings`` lead to on a device, torch or dali, and why.

    Raises:
        UserError: the settings exclude each other, or DALI is not installed.
    """
    has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali")
    if settings.loader == "dali":
        if settings.jpeg == "scaled":
            raise UserError("--jpeg scaled needs --loader torch: DALI decodes a JPEG at its whole size only")
        if not has_dali:
            raise UserError(
                "--loader dali needs DALI: pip install 'tracer-clip[dali]', or use --loader torch"
            )
        return "dali", "--loader dali"
    if settings.loader == "torch":
        return "torch", "--loader torch"
    if device.type != "cuda":
        return "torch", "there is no GPU"
    if settings.jpeg == "scaled":
        return "torch", "--jpeg scaled"
    if not has_dali:
        return "torch", "DALI is not installed"
    return "dali", "there is a GPU"


def announce(
    index: Index, picture_format: PictureFormat, settings: LoadingSettings, device: torch.device
) -> None:
    """Print which loader runs and why, and what it does with pictures that other programs may show otherwise."""
    name, why = choose(settings, device)
    note(f"loader {name} ({why})")
    about = index.about
    if about.turned:
        done = "turned upright" if settings.exif else "shown as they are stored (--exif true turns them)"
        note(f"'{index.name}': {counted(about.turned, 'picture')} with an EXIF rotation, {done}")
    if about.sixteen:
        note(f"'{index.name}': {counted(about.sixteen, 'picture')} of 16 bits a channel, scaled to 8")
    if settings.jpeg == "scaled":
        from tracer.data.threads import effect_of_scaling

        note(f"'{index.name}': {effect_of_scaling(index, picture_format, settings)}")
