"""Settings of the command ``evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tracer.data.config import LoadingSettings
from tracer.settings import check_set_names


@dataclass
class EvaluateConfig(LoadingSettings):
    """Measure the zero-shot accuracy and calibration of any open_clip model on your own sets.

    Args:
        eval_data: name → data of each evaluation set: a folder with a sub-folder per class, a CSV, TSV or Parquet
            file, WebDataset shards, or a published set as it is downloaded: ImageNet, -V2, -Sketch, -A, -R,
            ObjectNet, iWildCam and FMoW (PATH:SPLIT for one split), COCO and Flickr30k (their captions), CoOp's
            splits. A name holds no dots.
        classes: JSON file {class: [prompt, …]}; default: those of a published set, or else prompts made of the
            name of each label.
        model: open_clip model name, a model config (.json), local-dir:<folder>, hf-hub:<name>, or tracer-demo.
        pretrained: open_clip tag or local checkpoint file; null for a model that comes with its weights.
        precision: fp32; amp_bf16, which runs the towers in bfloat16; auto: amp_bf16 where the hardware multiplies
            bfloat16, else fp32.
        output: file for the results, JSON, or Markdown if it ends with .md; replaces only an earlier one of this
            command. Default: the results are only printed.
    """

    eval_data: dict[str, Path] = field(default_factory=dict)
    classes: Path | None = None
    model: str = "ViT-B-16-quickgelu"
    pretrained: str | None = "openai"
    precision: Literal["auto", "fp32", "amp_bf16"] = "fp32"
    output: Path | None = None

    def validate(self) -> None:
        """Raise UserError for the first setting whose value makes no sense, naming it and the remedy."""
        super().validate()
        check_set_names("eval_data", self.eval_data)
