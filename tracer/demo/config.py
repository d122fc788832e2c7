"""Settings of the commands ``demo``, ``sweep`` and ``pretrain``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from tracer.demo.methods import METHODS
from tracer.errors import UserError
from tracer.files import cache_folder
from tracer.recipes import R_ADAPTER
from tracer.settings import check_ranges, check_set_names
from tracer.train.baselines import overridden
from tracer.train.config import Config

ICONS = cache_folder() / "demo" / "icons"  # where the demo keeps its data

ROLES = ("in-distribution", "near", "shifted")  # of an evaluation set, seen from the training data

# What the protocol decides for every run, and so has no effect as an option.
DECIDED = {
    "method": "--methods says which methods are trained",
    "baseline": "--methods says which methods are trained",
    "teacher": "each of --methods has its own teacher",
    "adapters": "each of --methods trains adapters or does not",
    "seed": "the seeds are 0, 1, … below --seeds",
}


@dataclass
class SweepConfig(Config):
    """Compare methods at the settings that in-distribution validation chooses for each, of the same grid.

    Args:
        validation: pictures by which settings are chosen, as train_data; none of them is in an evaluation set.
            Default: for the icons a part of their in-distribution test pictures, divided by their grouping rule.
        methods: names of --baseline of finetune.
        grid: setting → values; each method is trained with every combination. lr_times multiplies the learning
            rate that a method has otherwise.
        seeds: runs of each method at its chosen settings; the chosen trial is the first of them.
        ablate: also train r-adapter, and r-adapter without each of its parts, by the same protocol.
        soups: also mix the trials of each method into uniform, greedy and Fisher-weighted soups.
        alphas: interpolation coefficients α at which the line from the start to each trained model is measured,
            besides 0 and 1.
        wise_alpha: the α of WiSE-FT in the table; R-Adapter's is adapter_alpha.
        adapter_lr: peak learning rate of runs that train adapters; lr is that of the whole models.
        kinds: evaluation set → in-distribution, near or shifted; default: the first is in-distribution, the
            others are shifted.
    """

    train_data: Path = ICONS / "train.csv"
    model: str = "tracer-demo"
    output: Path = Path("runs/sweep")
    validation: Path | None = None
    methods: tuple[str, ...] = ("flyp", "flyp-multi", "frozen", "ema", "wma", "r-adapter")
    grid: dict[str, list[int | float]] = field(default_factory=lambda: {"lr_times": [1 / 3, 1.0, 3.0]})
    seeds: int = 3
    ablate: bool = False
    soups: bool = True
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    wise_alpha: float = 0.5
    adapter_lr: float = R_ADAPTER.lr
    kinds: dict[str, str] = field(default_factory=dict)

    teacher_every: int | None = 1
    batch_size: int = 64
    lr: float | None = 3e-4
    warmup: int | None = 10
    adapter_momentum: float = 0.98  # a run is short

    default_steps: ClassVar[int] = 300

    @property
    def compared(self) -> list[str]:
        """Return the methods that are trained; those of ``ablate`` come behind the others."""
        parts = [name for name, method in METHODS.items() if "r-adapter" in (name, method.variant_of)]
        return [*self.methods, *(name for name in parts if self.ablate and name not in self.methods)]

    @classmethod
    def check_given(cls, values: Mapping[str, Any], given: Collection[str]) -> None:
        """Raise UserError for an option on the command line that the protocol or a method would override."""
        for name in DECIDED:
            if name in given:
                raise _without_effect(name, values[name])
        for method in values["methods"]:
            settings = METHODS[method].settings if method in METHODS else {}
            for name, own in overridden(settings, values, given, Config):
                raise UserError(
                    f"--{name} {values[name]} is the default of finetune, in place of which {method} has {own}: "
                    f"leave --{name} out, or give --grid.{name} '[{values[name]}]' for all methods"
                )

    def validate(self) -> None:
        """Raise UserError for the first setting that makes no sense, naming it and the remedy."""
        super().validate()
        for name in DECIDED:
            if getattr(self, name) != DEFAULTS[name]:
                raise _without_effect(name, getattr(self, name))
        check_ranges(
            self, {"at least 1": "seeds", "from 0 to 1": "alphas wise_alpha", "above 0": "adapter_lr"}
        )
        self._check_methods()
        self._check_grid()
        self._check_roles()
        if self.validation is None and self.train_data != ICONS / "train.csv":
            raise UserError(
                "settings are chosen by --validation PATH: give a folder, table or shards of pictures like those "
                "of --train_data that are in neither --train_data nor --eval_data"
            )

    def _check_methods(self) -> None:
        unknown = next((name for name in self.methods if name not in METHODS), None)
        if unknown or not self.methods:
            raise UserError(f"--methods {unknown or 'is empty'}: the methods are {', '.join(METHODS)}")
        name, times = Counter(self.methods).most_common(1)[0]
        if times > 1:
            raise UserError(f"--methods names {name} {times} times: name it once")
        for name in self.methods:
            whole = METHODS[name].variant_of
            if whole and whole not in self.compared:
                raise UserError(f"--methods {name} lacks a part of {whole}: add {whole}, to compare it with")
        adapted = next((name for name in self.compared if METHODS[name].adapted), None)
        if adapted and self.freezing:
            raise UserError(
                f"{' '.join(self.freezing)}: {adapted} trains adapters, which freeze all else: leave either out"
            )

    def _check_grid(self) -> None:
        known = {f.name for f in fields(Config)} - {"output", "seed", "baseline", "eval_data", "train_data"}
        for name, values in self.grid.items():
            if name not in known | {"lr_times"}:
                raise UserError(
                    f"--grid.{name} is not a setting of a run: give one of finetune's, or lr_times"
                )
            if not values:
                raise UserError(f"--grid.{name} has no values: give a list of at least one")
            kinds = NUMBERS.get(name, {float})
            if not kinds:
                raise UserError(f"--grid.{name}: a grid holds numbers, and --{name} takes none: leave it out")
            fraction = next((value for value in values if isinstance(value, float)), None)
            if fraction is not None and float not in kinds:
                raise UserError(f"--grid.{name} has {fraction}: --{name} takes whole numbers, such as 10")
            if len(set(values)) < len(values):
                raise UserError(f"--grid.{name} has a value twice: each trial is trained once")
        if {"lr", "lr_times"} <= self.grid.keys():
            raise UserError("--grid.lr and --grid.lr_times exclude each other: give one of them")

    def _check_roles(self) -> None:
        check_set_names("kinds", self.kinds)
        for name, role in self.kinds.items():
            if role not in ROLES:
                raise UserError(f"--kinds.{name} is '{role}': it must be one of {', '.join(ROLES)}")
            if self.eval_data and name not in self.eval_data:
                raise UserError(
                    f"--kinds.{name} names no evaluation set: the sets are {', '.join(self.eval_data)}"
                )


# What numbers each setting of a run takes; whole ones count as fractions where these are taken.
NUMBERS = {field.name: {int, float} & {field.type, *get_args(field.type)} for field in fields(Config)}

DEFAULTS = {field.name: field.default for field in fields(SweepConfig)}


def _without_effect(name: str, value: Any) -> UserError:
    return UserError(f"--{name} {value} has no effect: {DECIDED[name]}, so leave it out, or use finetune")


@dataclass
class DemoConfig(SweepConfig):
    """A sweep that takes minutes: fewer methods, seeds and steps, and no soups."""

    output: Path = Path("runs/demo")
    methods: tuple[str, ...] = ("flyp", "frozen", "ema", "wma", "r-adapter")
    seeds: int = 1
    soups: bool = False

    default_steps: ClassVar[int] = 150


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
