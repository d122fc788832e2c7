"""The settings of a fine-tuning run: its sections together, and what follows from them."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from tracer.data.config import LoadingSettings
from tracer.data.remote import address_of
from tracer.errors import UserError
from tracer.recipes import EMA, R_ADAPTER, TRACER, WMA
from tracer.train.baselines import BASELINES, BaselineSettings
from tracer.train.sections import (
    DataSettings,
    EngineSettings,
    FreezingSettings,
    MethodSettings,
    ModelSettings,
    OptimisationSettings,
    RunSettings,
)
from tracer.words import counted

AnyConfig = TypeVar("AnyConfig", bound="Config")


class Recipe(NamedTuple):
    """The settings whose published value depends on the method."""

    margin: float
    smoothing: float
    lr: float
    weight_decay: float


# A dataclass takes the fields of its last base first.
@dataclass
class Config(
    BaselineSettings,
    RunSettings,
    EngineSettings,
    OptimisationSettings,
    FreezingSettings,
    MethodSettings,
    ModelSettings,
    LoadingSettings,
    DataSettings,
):
    """Fine-tune an open_clip model; defaults are the published settings for ViT-B/16.

    Three settings are exceptions: steps, since the papers train 10 epochs (--epochs 10 does so too), and clip_grad
    and crop_scale, whose values the papers do not give.
    """

    @property
    def recipe(self) -> Recipe:
        """Return what the user set, and the published value for the rest."""
        loss = R_ADAPTER if self.method == "r-adapter" else TRACER
        optimizer = R_ADAPTER if self.adapted else TRACER
        published = Recipe(loss.margin, loss.smoothing, optimizer.lr, optimizer.weight_decay)
        chosen = {name: getattr(self, name) for name in Recipe._fields}
        return published._replace(**{name: value for name, value in chosen.items() if value is not None})

    def resolve(self: AnyConfig, pictures: int) -> AnyConfig:
        """Return the settings with steps in place of epochs, for so many training pictures.

        Raises:
            UserError: the steps are too few for the warm-up.
        """
        if self.epochs is None:
            return self
        steps = max(1, self.epochs * pictures // (self.batch_size * self.accumulation))
        if self.warmup is not None and self.warmup >= steps:
            raise UserError(
                f"--warmup is {self.warmup}: it must be below the {counted(steps, 'step')} that --epochs "
                f"{self.epochs} makes of {counted(pictures, 'picture')}"
            )
        return dataclasses.replace(self, steps=steps, epochs=None)

    def validate(self) -> None:
        """Raise UserError for the first setting whose value makes no sense, naming it and the remedy."""
        sections = (
            DataSettings,
            LoadingSettings,
            MethodSettings,
            FreezingSettings,
            OptimisationSettings,
            EngineSettings,
            RunSettings,
            BaselineSettings,
        )
        for section in sections:
            section.validate(self)
        if self.eval_every and not self.eval_data:
            raise UserError(
                f"--eval_every {self.eval_every} needs evaluation sets: give --eval_data.NAME PATH"
            )
        if self.keep_best and not self.eval_every:
            raise UserError(
                f"--keep_best {self.keep_best} needs --eval_every N, the steps between evaluations"
            )
        if self.adapted and self.freezing:
            raise UserError(
                f"{' '.join(self.freezing)} and adapters exclude each other: adapters freeze all the rest, and "
                "--adapter_towers chooses the tower"
            )

    @property
    def moves_every(self) -> int:
        """Return the number of optimizer steps between two moves of the teacher's average."""
        if self.teacher_every is not None:
            return self.teacher_every
        return min(EMA.every, max(1, self.total_steps // 50)) if self.teacher == "ema" else WMA.every

    def taken(self) -> dict[str, Any]:
        """Return the value that each setting takes which was left to method, baseline or number of steps."""
        values: dict[str, Any] = self.recipe._asdict() | {"adapters": self.adapted}
        if self.steps is not None:
            values |= {"warmup": self.warmup_steps, "teacher_every": self.moves_every}
        values = {name: value for name, value in values.items() if getattr(self, name) is None}
        return values | self._of_baseline()

    def _of_baseline(self) -> dict[str, Any]:
        """Return the settings that have the values of the chosen baseline."""
        settings = BASELINES[self.baseline].settings if self.baseline else {}
        return {name: value for name, value in settings.items() if getattr(self, name) == value}

    def plain(self) -> dict[str, Any]:
        """Return the settings as YAML and JSON have them; paths are absolute, to hold from any folder."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {f.name: f.default for f in dataclasses.fields(self) if f.name in self._of_baseline()}
        plain = {
            name: _absolute(value) if isinstance(value, Path) else value for name, value in values.items()
        }
        plain["eval_data"] = {name: _absolute(path) for name, path in self.eval_data.items()}
        for name in ("model", "pretrained", "templates"):  # names, or paths of files
            if plain[name] and Path(plain[name]).exists():
                plain[name] = _absolute(plain[name])
        if self.model.startswith("local-dir:"):
            plain["model"] = f"local-dir:{_absolute(self.model.removeprefix('local-dir:'))}"
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def to_yaml(self) -> str:
        """Return the settings as YAML that ``--config`` reads back.

        What nobody chose stays unset, so that another ``--method`` brings its own values; the value that it took
        stands beside it.
        """
        taken = self.taken()
        lines = []
        for name, value in self.plain().items():
            text = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True).rstrip()
            lines.append(f"{text}  # {taken[name]}" if name in taken else text)
        return "\n".join(lines) + "\n"


def _absolute(path: Path | str) -> str:
    return str(path) if address_of(path) else os.path.abspath(path)
