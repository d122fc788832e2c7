"""Where the scalars of a run's steps go besides ``log.jsonl``: TensorBoard, CSV, Weights & Biases, MLflow."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tracer.errors import UserError, how_to_install

Scalars = Mapping[str, float]

PROJECT = "tracer"  # under which Weights & Biases and MLflow show the runs


class Logger(Protocol):
    """A place for the scalars of each step.

    It is made with the folder of the run, the number of steps that are logged already, and the run's settings.
    """

    def __init__(self, folder: Path, after: int, settings: Mapping[str, Any]) -> None: ...

    def add(self, step: int, scalars: Scalars) -> None:
        """Take the scalars of a step."""

    def flush(self) -> None:
        """Write what was taken so far."""

    def close(self) -> None:
        """Write all, and end."""


class TensorBoard:
    """Event files in the folder ``tensorboard``, with the settings as hyper-parameters."""

    def __init__(self, folder: Path, after: int, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        purge = {"purge_step": after + 1} if after else {}
        self._board = SummaryWriter(str(folder / "tensorboard"), **purge)
        for summary in hparams(_flat(settings), {"loss": 0}) if settings and not after else ():
            self._board._get_file_writer().add_summary(summary)

    def add(self, step: int, scalars: Scalars) -> None:
        """Take the scalars of a step."""
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write what was taken so far."""
        self._board.flush()

    def close(self) -> None:
        """Write all, and end."""
        self._board.close()


class Csv:
    """The file ``log.csv``, made of ``log.jsonl`` when the run ends: only then all columns are known."""

    def __init__(self, folder: Path, after: int, settings: Mapping[str, Any]) -> None:
        self._folder = folder

    def add(self, step: int, scalars: Scalars) -> None:
        """Leave the scalars to ``log.jsonl``."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Write the table; a quantity that was not measured at a step leaves its cell empty."""
        rows = [json.loads(line) for line in (self._folder / "log.jsonl").read_text().splitlines()]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with (self._folder / "log.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


class WandB:
    """A run of Weights & Biases that a resumed run continues."""

    def __init__(self, folder: Path, after: int, settings: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        mark = folder / "wandb-id.txt"
        known = mark.read_text() if mark.is_file() else None
        name = Path(str(settings.get("output", folder))).name
        self._run = wandb.init(
            project=PROJECT, name=name, dir=str(folder), config=dict(settings), id=known, resume="allow"
        )
        mark.write_text(self._run.id)

    def add(self, step: int, scalars: Scalars) -> None:
        """Take the scalars of a step."""
        self._run.log(dict(scalars), step=step)

    def flush(self) -> None:
        """Do nothing: the library writes by itself."""

    def close(self) -> None:
        """Write all, and end."""
        self._run.finish()


class MLflow:
    """A run of MLflow that a resumed run continues."""

    def __init__(self, folder: Path, after: int, settings: Mapping[str, Any]) -> None:
        self._mlflow = importlib.import_module("mlflow")
        mark = folder / "mlflow-id.txt"
        self._mlflow.set_experiment(PROJECT)
        if mark.is_file():
            self._mlflow.start_run(run_id=mark.read_text())
            return
        run = self._mlflow.start_run(run_name=Path(str(settings.get("output", folder))).name)
        self._mlflow.log_params(_flat(settings))
        mark.write_text(run.info.run_id)

    def add(self, step: int, scalars: Scalars) -> None:
        """Take the scalars of a step."""
        self._mlflow.log_metrics(dict(scalars), step=step)

    def flush(self) -> None:
        """Do nothing: the library writes by itself."""

    def close(self) -> None:
        """Write all, and end."""
        self._mlflow.end_run()


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "csv": Csv, "wandb": WandB, "mlflow": MLflow}


def check_loggers(names: Sequence[str]) -> None:
    """Raise UserError for the first logger whose library is not installed; it is not imported."""
    for name in names:
        if name != "csv" and importlib.util.find_spec(name) is None:
            raise UserError(f"--log_to {name} {how_to_install(name)}")


def _flat(settings: Mapping[str, Any]) -> dict[str, str | float | bool]:
    """Return settings as the loggers take them: numbers, switches and texts."""
    plain: dict[str, str | float | bool] = {}
    for name, value in settings.items():
        plain[name] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
    return plain
