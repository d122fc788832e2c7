"""Settings of the command ``evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tracer.settings import check_ranges, check_set_names


@dataclass
class EvaluateConfig:
    """Measure the zero-shot accuracy and calibration of any open_clip model on your own sets.

    Args:
        eval_data: name → CSV or folder of each evaluation set. A name holds no dots.
        classes: JSON file {class: [prompt, …]}; default: one prompt for each label, made of its name.
        model: open_clip model name, a model config (.json), or tracer-demo.
        pretrained: open_clip tag or local checkpoint file.
        output: JSON file for the results; replaces only an earlier one of this command. Default: the results
            are only printed.
        workers: threads that decode pictures.
        check_images: decode every picture once before the evaluation, so that a damaged one is named at once.
        cache: folder that remembers which data sets have passed this check.
    """

    eval_data: dict[str, Path]
    classes: Path | None = None
    model: str = "ViT-B-16"
    pretrained: str | None = "openai"
    output: Path | None = None
    workers: int = 2
    check_images: bool = True
    cache: Path = Path("runs/cache")

    def validate(self) -> None:
        """Raise UserError for the first setting whose value makes no sense, naming it and the remedy."""
        check_ranges(self, {"at least 1": "workers"})
        check_set_names("eval_data", self.eval_data)
