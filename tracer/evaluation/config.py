"""Settings of the command ``evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tracer.data.config import LoadingSettings
from tracer.errors import UserError
from tracer.settings import as_paths, check_set_names, check_templates


@dataclass
class SoupConfig(LoadingSettings):
    """Mix the weights of several runs that began at one start.

    Args:
        runs: folders of runs (their students), or files of weights that tracer wrote.
        kind: uniform, the mean; greedy, the mean of those that make validation no worse, from the best on; fisher,
            the mean weighted by diagonal Fisher information.
        validation: labelled pictures, as a set of evaluate; greedy validates on them, and fisher measures on them.
        classes: JSON file {class: [prompt, …]}; default: those of the first run, else the labels of validation.
        prompt_template: prompt of every class, with {} for its name; may be given several times.
        output: file of weights; must not exist.
    """

    runs: list[Path] = field(default_factory=list)
    kind: Literal["uniform", "greedy", "fisher"] = "uniform"
    validation: Path | None = None
    classes: Path | None = None
    prompt_template: list[str] = field(default_factory=list)
    output: Path = Path("soup.safetensors")

    def __post_init__(self) -> None:
        as_paths(self)
        self.runs = [Path(run) for run in self.runs]

    def validate(self) -> None:
        """Raise UserError for the first setting whose value makes no sense, naming it and the remedy."""
        super().validate()
        check_templates(self.prompt_template, self.classes)
        if len(self.runs) < 2:
            raise UserError("a soup mixes the weights of several runs: give at least two")
        if self.kind != "uniform" and self.validation is None:
            raise UserError(f"--kind {self.kind} needs labelled pictures: give --validation PATH")
        repeated = next((run for run in self.runs if self.runs.count(run) > 1), None)
        if repeated:
            raise UserError(f"'{repeated}' is named twice: a soup takes each once")
        idle = [n for n in ("validation", "classes", "prompt_template") if getattr(self, n)]
        if self.kind == "uniform" and idle:
            raise UserError(
                f"--{idle[0]} has no effect with --kind uniform: leave it out, or choose greedy or fisher"
            )


@dataclass
class EvaluateConfig(LoadingSettings):
    """Measure the zero-shot accuracy and calibration of any open_clip model on your own sets.

    Args:
        eval_data: name → data of each evaluation set: a folder with a sub-folder per class, a CSV, TSV or Parquet
            file, WebDataset shards, or a published set as it is downloaded: ImageNet, -V2, -Sketch, -A, -R,
            ObjectNet, iWildCam and FMoW (PATH:SPLIT for one split), COCO and Flickr30k (their captions), CoOp's
            splits. A name holds no dots.
        classes: JSON file {class: [prompt, …]}; default: those of a published set, else of the run that trained
            the model, else the labels of the sets.
        prompt_template: prompt of every class of sets of your own, with {} for its name; may be given several
            times; openai stands for open_clip's 80. Default: "a photo of a {}".
        model: open_clip model name, a model config (.json), local-dir:<folder>, hf-hub:<name>, or tracer-demo;
            auto: the model that a run's weights name, else ViT-B-16-quickgelu.
        pretrained: open_clip tag, local checkpoint file, folder of a run (its student), or null for random
            weights; auto: the model's own weights where it comes with them, else openai.
        precision: fp32; amp_bf16, which runs the towers in bfloat16; auto: amp_bf16 where the hardware multiplies
            bfloat16, else fp32.
        output: file for the results, JSON, or Markdown if it ends with .md; replaces only an earlier one of this
            command. Default: the results are only printed.
    """

    eval_data: dict[str, Path] = field(default_factory=dict)
    classes: Path | None = None
    prompt_template: list[str] = field(default_factory=list)
    model: str = "auto"
    pretrained: str | None = "auto"
    precision: Literal["auto", "fp32", "amp_bf16"] = "fp32"
    output: Path | None = None

    def __post_init__(self) -> None:
        as_paths(self)

    def validate(self) -> None:
        """Raise UserError for the first setting whose value makes no sense, naming it and the remedy."""
        super().validate()
        check_set_names("eval_data", self.eval_data)
        check_templates(self.prompt_template, self.classes)
