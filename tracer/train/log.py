"""Write down the scalars of every training step, as JSON lines and with the loggers that the user chose."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor
from tqdm import tqdm

from tracer.errors import UserError
from tracer.files import whole_file
from tracer.train.loggers import LOGGERS, Logger

SCORES = "eval/"  # what the names of scores begin with


class StepLog:
    """A log with a row of scalars per optimizer step, in ``log.jsonl`` and in each of the ``loggers``.

    Device tensors stay on the device until ``every`` steps have gathered, so that logging does not make the
    host wait for the GPU at each step.

    Args:
        folder: the run's; the log of an earlier attempt in it is continued. None writes nothing, and only counts.
        after: steps of that log that still hold; the rows of later ones are dropped, in TensorBoard too.
        every: steps between two writes.
        loggers: names of :data:`tracer.train.loggers.LOGGERS`.
        settings: of the run, which some loggers show.

    Attributes:
        skipped: how many of all rows tell of a skipped step (``skipped`` is 1).
        evaluated: whether the last row of an earlier attempt has scores.
        skipped_in_a_row: how many of the last rows do so; steps that fp16 skipped for too large a loss scale
            (``overflow`` is 1) are left out of this count.

    Raises:
        UserError: the earlier log has fewer rows than ``after``.
    """

    def __init__(
        self,
        folder: Path | None,
        after: int = 0,
        every: int = 25,
        loggers: Sequence[str] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
    ):
        self.every = every
        self._loggers: list[Logger] = []
        self._rows: list[tuple[int, dict[str, Tensor | float]]] = []
        self.skipped = self.skipped_in_a_row = 0
        self.evaluated = False
        self._file: TextIO | None = None
        if folder is not None:
            self._open(folder, after)
            self._loggers = [LOGGERS[name](folder, after, settings or {}) for name in loggers]

    def _open(self, folder: Path, after: int) -> None:
        path = folder / "log.jsonl"
        rows = trim_log(path, after)
        if rows < after:
            raise UserError(
                f"'{path}' has lost rows: {rows} of the {after} until the last checkpoint are there; "
                f"remove '{folder}' to start anew, or choose another --output"
            )
        for row in read_log(folder):
            self._count(row)
            self.evaluated = any(name.startswith(SCORES) for name in row)
        self._file, self._path = path.open("a"), path

    def amend(self, values: Mapping[str, float]) -> None:
        """Add the scores that an earlier attempt could not wait for to the row of its last step."""
        if self._file is None or not values:
            return
        *before, last = self._path.read_text().splitlines(keepends=True)
        row = json.loads(last)
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.close()
        with whole_file(self._path) as part:
            part.write_text("".join(before) + json.dumps({**row, **finite}, allow_nan=False) + "\n")
        self._file = self._path.open("a")
        for logger in self._loggers:
            logger.add(int(row["step"]), finite)

    def write(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Note the values of one step: numbers, or tensors of one element.

        A value that is not finite is left out of the logs: JSON has no number for it.
        """
        self._count(values)
        if self._file is None:
            return
        self._rows.append((step, {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}))
        if len(self._rows) >= self.every:
            self.flush()

    def _count(self, values: Mapping[str, Tensor | float]) -> None:
        skipped = int(values.get("skipped", 0))
        self.skipped += skipped
        if not values.get("overflow"):
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def flush(self) -> None:
        """Write the gathered rows to all logs."""
        if self._file is None:
            return
        for step, values in self._rows:
            scalars = {name: float(value) for name, value in values.items()}
            scalars = {name: value for name, value in scalars.items() if math.isfinite(value)}
            self._file.write(json.dumps({"step": step, **scalars}, allow_nan=False) + "\n")
            for logger in self._loggers:
                logger.add(step, scalars)
        self._rows.clear()
        self._file.flush()

    def sync(self) -> None:
        """Wait until all rows so far are on the disk, and with the loggers."""
        self.flush()
        if self._file is not None:
            for logger in self._loggers:
                logger.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # Where another error ends the block, that is the one to report.
        with suppress(OSError) if kind else nullcontext():
            self.flush()
            if self._file is not None:
                self._file.close()
                for logger in self._loggers:
                    logger.close()


class Shown:
    """Shows loss and pairs per second in a bar, at most once a second: reading the loss waits for the GPU.

    Args:
        bar: of the steps.
        pairs: of a step.
    """

    def __init__(self, bar: tqdm, pairs: int) -> None:
        self._bar, self._pairs = bar, pairs
        self._time, self._steps = time.perf_counter(), 0

    def update(self, loss: Tensor | float, skipped: int) -> None:
        """Note a step, and show it if the last one is a second old."""
        self._steps += 1
        passed = time.perf_counter() - self._time
        if passed < 1 or self._bar.disable:
            return
        about = {"loss": f"{float(loss):.3f}", "pairs/s": f"{self._steps * self._pairs / passed:.0f}"}
        self._bar.set_postfix(about | ({"skipped": skipped} if skipped else {}))
        self._time, self._steps = time.perf_counter(), 0


def read_log(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's ``log.jsonl``."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def trim_log(path: Path, step: int) -> int:
    """Drop the rows of a JSON-lines log after ``step``, and return how many are left.

    The steps after a checkpoint are done again. A row that was cut off while it was written ends the log. A log
    that does not exist becomes an empty file.
    """
    rows = []
    for row in path.read_text().splitlines(keepends=True) if path.exists() else ():
        try:
            done = row.endswith("\n") and json.loads(row)["step"] <= step
        except ValueError:
            break
        if not done:
            break
        rows.append(row)
    with whole_file(path) as part:
        part.write_text("".join(rows))
    return len(rows)
