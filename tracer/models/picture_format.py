"""The pictures that a model expects: their size, how they are resized, and how their colours are normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PictureFormat:
    """A model's input format. The fields have the names and the meaning of open_clip's ``PreprocessCfg``.

    Attributes:
        size: side of the square input, in pixels.
        mean, std: of each RGB channel, for values in [0, 1]; a channel becomes (value − mean) / std.
        interpolation: filter that resizes a picture; shrinking is antialiased.
        resize_mode: ``shortest`` resizes the shorter side to ``size`` and crops the centre; ``squash`` resizes
            both sides to ``size``.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"
