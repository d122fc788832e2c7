"""What a run writes down while it trains: JSON lines and TensorBoard."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext, suppress
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from tracer.errors import UserError
from tracer.files import whole_file


class StepLog:
    """A line of scalars per optimizer step, as ``log.jsonl`` and under ``tensorboard/``.

    Device tensors stay on the device until ``every`` steps have gathered, so that logging does not make the
    host wait for the GPU at each step.

    Args:
        folder: of the run; an earlier attempt's log in it is taken up.
        after: steps of that log that still hold; later ones are dropped, in TensorBoard too.
        every: steps between two writes.

    Raises:
        UserError: the earlier log has fewer rows than ``after``.
    """

    def __init__(self, folder: Path, after: int = 0, every: int = 25):
        self.every = every
        self._rows: list[tuple[int, dict[str, Tensor | float]]] = []
        path = folder / "log.jsonl"
        rows = path.read_text().splitlines(keepends=True)[:after] if after and path.exists() else []
        if len(rows) < after:
            raise UserError(
                f"'{path}' has lost rows: {len(rows)} of the {after} until the last checkpoint are there; "
                f"remove '{folder}' to start anew, or choose another --output"
            )
        with whole_file(path) as part:
            part.write_text("".join(rows))
        self._file = path.open("a")
        purge = {"purge_step": after + 1} if after else {}
        self._board = SummaryWriter(str(folder / "tensorboard"), **purge)

    def write(self, step: int, **values: Tensor | float) -> None:
        """Note the values of one step; scalars, or tensors of one element."""
        self._rows.append((step, {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}))
        if len(self._rows) >= self.every:
            self.flush()

    def flush(self) -> None:
        for step, values in self._rows:
            scalars = {name: float(value) for name, value in values.items()}
            self._file.write(json.dumps({"step": step, **scalars}) + "\n")
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        self._rows.clear()
        self._file.flush()

    def sync(self) -> None:
        """Wait until all rows so far are on the disk, and in TensorBoard's file."""
        self.flush()
        self._board.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with suppress(OSError) if kind else nullcontext():  # an earlier error is the one to tell
            self.flush()
            self._file.close()
            self._board.close()


def read_log(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's ``log.jsonl``."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
