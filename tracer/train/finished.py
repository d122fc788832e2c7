"""Commands on finished runs: fold adapters again, average weights, and say what a run was."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tracer.errors import UserError
from tracer.settings import as_paths, check_ranges
from tracer.train.config import Config
from tracer.train.sections import MethodSettings
from tracer.words import counted

NEEDED = ("run.json", "metrics.json", "config.yaml")  # of the folder of a finished run


@dataclass
class FoldConfig:
    """Fold the adapters of a run into its start with another α, without training again.

    Args:
        run: folder of a run that trained adapters.
        alpha: α by which the adapters are scaled, in [0, 1].
        last: fold the adapters of the last step, in place of their average.
        output: file of weights; must not exist. Default: folded-ALPHA.safetensors in the folder of the run.
    """

    run: Path
    alpha: float = 0.5
    last: bool = False
    output: Path | None = None

    def __post_init__(self) -> None:
        as_paths(self)

    def validate(self) -> None:
        """Raise UserError for the first setting that is out of range."""
        check_ranges(self, {"from 0 to 1": "alpha"})


@dataclass
class WiseConfig:
    """Average two models' weights: (1 − α)·A + α·B (WiSE-FT).

    Args:
        a: run, file of weights or tag of open_clip; start: what the run B started from, as in WiSE-FT.
        b: run or file of weights; names the model.
        alpha: α, the share of B, in [0, 1].
        output: file of weights; must not exist.
    """

    a: Path
    b: Path
    alpha: float = 0.5
    output: Path = Path("wise.safetensors")

    def __post_init__(self) -> None:
        as_paths(self)

    def validate(self) -> None:
        """Raise UserError for the first setting that is out of range."""
        check_ranges(self, {"from 0 to 1": "alpha"})


@dataclass
class ShowConfig:
    """Say what a run was, what it reached, and how to repeat it.

    Args:
        run: folder of a finished run.
    """

    run: Path

    def __post_init__(self) -> None:
        as_paths(self)

    def validate(self) -> None:
        """Accept every path; :func:`show` refuses what is not a run."""


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return what ``run.json`` and ``metrics.json`` of a run hold, and its settings with the values they took.

    Raises:
        UserError: the folder is not that of a finished run of this version.
    """
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise UserError(f"'{folder}' is not the folder of a finished run (it holds no {missing[0]})")
    about, metrics = (json.loads((folder / name).read_text()) for name in NEEDED[:2])
    if about.get("schema") != 1 or "scores" not in metrics:
        raise UserError(f"'{folder}' was written by another version of tracer: run it again to compare it")
    config = Config(**yaml.safe_load((folder / "config.yaml").read_text()))
    return about, metrics, config.plain() | config.taken()


def fold_again(config: FoldConfig) -> Path:
    """Write the run's start with its adapters folded in, and return the path of the file.

    Raises:
        UserError: the run trained no adapters, or its start is not there any more.
    """
    from tracer.adapters import fold, read_adapters
    from tracer.files import check_output
    from tracer.models.clip import load_clip
    from tracer.models.weights import save_weights
    from tracer.train.scoring import trained_form, trained_from

    about, _, settings = read_run(config.run)
    file = config.run / ("adapters_last.safetensors" if config.last else "adapters.safetensors")
    if not file.is_file():
        raise UserError(
            f"'{config.run}' trained no adapters ('{file.name}' is missing): fold runs of r-adapter"
        )
    output = config.output or config.run / f"folded-{config.alpha:g}.safetensors"
    check_output(output)
    clip = load_clip(settings["model"], settings["pretrained"])
    _check_start(config.run, about, settings, clip.model.state_dict())
    method = MethodSettings(contrast=settings["contrast"], logit_bias=settings["logit_bias"])
    base = trained_from(method, clip.model.state_dict())
    try:
        state = fold(base | read_adapters(file, clip.name), config.alpha)
    except ValueError as error:
        raise UserError(str(error)) from error
    architecture = replace(clip.architecture, form=trained_form(method, clip))
    save_weights(state, output, architecture.metadata())
    return output


def _check_start(run: Path, about: dict[str, Any], settings: dict[str, Any], state: Any) -> None:
    from tracer.evaluation.record import digest_of_start

    if digest_of_start(settings["model"], settings["pretrained"], state) != about["weights"]["zero-shot"]:
        raise UserError(
            f"'{settings['pretrained']}' has changed since '{run}' started from it: adapters fit only their start"
        )


def average(config: WiseConfig) -> Path:
    """Write the average of two models' weights, and return the path of the file.

    Raises:
        UserError: the models differ in their architecture, or in the form of their loss. A run's own start may
            have had another: the average is then used as the run's weights are.
    """
    from tracer.files import check_output
    from tracer.models.architecture import one_form
    from tracer.models.choice import choose_model
    from tracer.models.clip import load_clip
    from tracer.models.heads import head_state, start_head
    from tracer.models.soups import interpolate
    from tracer.models.weights import save_weights

    check_output(config.output)
    end = load_clip("auto", str(config.b))
    if end.config is None:
        raise UserError(f"'{config.b}' does not say its model: give a run or weights that tracer wrote")
    if str(config.a) == "start":
        settings = read_run(config.b)[2]
        start = load_clip(settings["model"], settings["pretrained"])
    else:
        start = load_clip(choose_model("auto", str(config.b)).model, str(config.a))
        one_form({str(config.a): start.form, str(config.b): end.form})
    begin, last = start.model.state_dict(), end.model.state_dict()
    if str(config.a) == "start":
        begin |= start_head(config.b if config.b.is_dir() else config.b.parent)
    if head_state(last) and head_state(begin).keys() != head_state(last).keys():
        raise UserError(
            f"'{config.b}' has a classifier beside its towers, and '{config.a}' has none: average it with its "
            "start, as 'tracer wise start RUN' does"
        )
    state = interpolate(begin, last, config.alpha)
    save_weights(state, config.output, end.architecture.metadata())
    return config.output


def _command() -> str:
    """Return how the user's shell finds this command: by its name, or else by the path that was given."""
    given = sys.argv[0]
    return given if Path(given).name == "tracer" and not shutil.which("tracer") else "tracer"


def show(config: ShowConfig) -> tuple[list[str], dict[str, Any]]:
    """Return what a run was and how to repeat it, a line each, and its scores."""
    from tracer.machine import versions
    from tracer.models.choice import choose_model

    about, metrics, settings = read_run(config.run)
    method = settings["method"] + (
        f", {settings['teacher']} teacher" if settings["method"] == "tracer" else ""
    )
    changed = [
        f"{name} {then}, now {now}"
        for name, then in about["versions"].items()
        if (now := versions().get(name, "missing")) != then
    ]
    start = choose_model(settings["model"], settings["pretrained"]).pretrained
    file = config.run / "config.yaml"
    again = [_command(), "finetune", "--config", str(file), "--output", str(config.run) + "-again"]
    lines = [
        f"{config.run}: {method}, {about['model']} from {start or 'its own weights'}, seed {settings['seed']}",
        f"trained on: {settings['train_data']}",
        f"for: {counted(settings['steps'], 'step')} of "
        f"{counted(settings['batch_size'] * settings['accumulation'], 'pair')} in "
        f"{about['seconds']:.0f} s, {about['precision']}",
        f"classes: {len(about['classes'])}",
        *(f"weights of {name}: sha256 {digest}" for name, digest in about["weights"].items()),
        *(f"note: {text}" for text in about["notices"]),
        *([f"versions that have changed since: {'; '.join(changed)}"] if changed else []),
        f"repeat it: {shlex.join(again)}",
    ]
    return lines, metrics["scores"]
