"""Settings of the commands ``demo``, ``sweep`` and ``pretrain``."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

from tracer.errors import UserError
from tracer.files import cache_folder
from tracer.recipes import R_ADAPTER
from tracer.settings import check_ranges, check_set_names
from tracer.train.baselines import BASELINES
from tracer.train.config import Config

ICONS = cache_folder() / "demo" / "icons"  # where the demo keeps its data

ROLES = ("in-distribution", "near", "shifted")  # of an evaluation set, seen from the training data


@dataclass
class DemoConfig(Config):
    """Settings of the demo: those of a fine-tuning run, and what is compared.

    Args:
        seeds: runs of each method.
        alphas: interpolation coefficients α at which WiSE-FT and R-Adapter are measured, besides 0 and 1.
        wise_alpha: the α of WiSE-FT in the table; R-Adapter's is adapter_alpha.
        ablate: also train R-Adapter with InfoNCE and without dropping, and fold it without each self-ensemble.
        adapter_lr: peak learning rate of runs that train adapters; lr is that of the whole models.
        kinds: evaluation set → in-distribution, near or shifted; default: the first is in-distribution, the
            others are shifted.
    """

    train_data: Path = ICONS / "train.csv"
    model: str = "tracer-demo"
    output: Path = Path("runs/demo")
    seeds: int = 3
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    wise_alpha: float = 0.5
    ablate: bool = False
    adapter_lr: float = R_ADAPTER.lr
    kinds: dict[str, str] = field(default_factory=dict)

    teacher_every: int | None = 1
    batch_size: int = 128
    lr: float | None = 3e-4
    warmup: int = 10
    adapter_momentum: float = 0.98  # a run is short

    default_steps: ClassVar[int] = 100

    def validate(self) -> None:
        """Raise UserError for the first invalid setting, naming it and the remedy."""
        super().validate()
        self._refuse_what_the_demo_decides()
        check_ranges(
            self, {"at least 1": "seeds", "from 0 to 1": "alphas wise_alpha", "above 0": "adapter_lr"}
        )
        if self.freezing:
            raise UserError(
                f"{' '.join(self.freezing)}: the demo trains adapters too, use finetune to freeze parts"
            )
        check_set_names("kinds", self.kinds)
        for name, role in self.kinds.items():
            if role not in ROLES:
                raise UserError(f"--kinds.{name} is '{role}': it must be one of {', '.join(ROLES)}")
            if self.eval_data and name not in self.eval_data:
                raise UserError(
                    f"--kinds.{name} names no evaluation set: the sets are {', '.join(self.eval_data)}"
                )

    def _refuse_what_the_demo_decides(self) -> None:
        remedies = {
            "method": "the demo trains every method",
            "teacher": "the demo trains with each teacher",
            "adapters": "the demo trains with and without adapters",
            "seed": "the demo trains with the seeds 0, 1, … below --seeds",
        }
        for name, why in remedies.items():
            if getattr(self, name) != DEFAULTS[name]:
                raise UserError(
                    f"--{name} {getattr(self, name)} has no effect: {why}, so leave it out, or use finetune"
                )


DEFAULTS = {field.name: field.default for field in fields(DemoConfig)}


@dataclass
class SweepConfig(DemoConfig):
    """Compare methods at the settings that in-distribution validation chooses for each, of the same grid.

    Args:
        validation: pictures by which settings are chosen, as train_data; none of them is in an evaluation set.
            Default: for the icons a part of their in-distribution test pictures, divided by their grouping rule.
        methods: names of --baseline of finetune.
        grid: setting → values; each method is trained with every combination. lr_times multiplies the learning
            rate that a method has otherwise.
        soups: also mix the trials of each method into uniform, greedy and Fisher-weighted soups.
    """

    output: Path = Path("runs/sweep")
    validation: Path | None = None
    methods: tuple[str, ...] = ("flyp", "flyp-multi", "frozen", "ema", "wma", "r-adapter")
    grid: dict[str, list[int | float]] = field(default_factory=lambda: {"lr_times": [1 / 3, 1.0, 3.0]})
    soups: bool = True

    lr: float | None = 3e-4
    batch_size: int = 64

    default_steps: ClassVar[int] = 300

    def validate(self) -> None:
        """Raise UserError for the first setting that makes no sense, naming it and the remedy."""
        super().validate()
        unknown = next((name for name in self.methods if name not in BASELINES), None)
        if unknown or not self.methods:
            raise UserError(f"--methods {unknown or 'is empty'}: the methods are {', '.join(BASELINES)}")
        known = {f.name for f in fields(Config)} - {"output", "seed", "baseline", "eval_data", "train_data"}
        for name, values in self.grid.items():
            if name not in known | {"lr_times"}:
                raise UserError(
                    f"--grid.{name} is not a setting of a run: give one of finetune's, or lr_times"
                )
            if not values:
                raise UserError(f"--grid.{name} has no values: give a list of at least one")
        if {"lr", "lr_times"} <= self.grid.keys():
            raise UserError("--grid.lr and --grid.lr_times exclude each other: give one of them")
        if self.validation is None and self.train_data != ICONS / "train.csv":
            raise UserError(
                "a sweep chooses by --validation: give a folder, table or shards of pictures for it"
            )


@dataclass
class PretrainConfig:
    """Train the small CLIP that the demo starts from; the defaults are the recipe of the shipped checkpoint.

    Args:
        data: folder whose ``packages`` holds the downloaded icon themes; what is missing is downloaded.
        output: folder of ``model.safetensors``, ``log.jsonl`` and, until the run is complete, ``resume.pt``.
        minutes: wall-clock budget of the training; the learning rate follows the clock.
        batch_size: pictures per step, each with one of its captions.
        lr: peak learning rate of AdamW.
        weight_decay: weight decay of AdamW, on matrices only.
        warmup: share of the budget in which the learning rate rises linearly; then cosine to 0.
        named: how many times as often a step draws an icon of a benchmark class as another icon.
        precision: bf16 runs the towers in bfloat16 autocast; weights stay fp32.
        save_every: minutes between two resumable checkpoints.
        workers: threads that render pictures.
        seed: seed of the weights, the order, the captions and the augmentation.
    """

    data: Path = ICONS.parent
    output: Path = Path("runs/pretrain")
    minutes: float = 65.0
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: float = 0.02
    named: float = 2.5
    precision: Literal["fp32", "bf16"] = "bf16"
    save_every: float = 5.0
    workers: int = 2
    seed: int = 0

    def validate(self) -> None:
        """Raise UserError for the first invalid setting, naming it and the remedy."""
        check_ranges(
            self,
            {
                "above 0": "minutes batch_size lr named save_every workers",
                "at least 0": "weight_decay",
                "from 0 to 2147483647": "seed",
            },
        )
        if self.batch_size < 2:
            raise UserError("--batch_size is 1: a contrastive loss needs at least 2 pairs to compare")
        if not 0 < self.warmup < 1:  # also refuses NaN
            raise UserError(f"--warmup is {self.warmup}: it must be a share of the budget, between 0 and 1")
