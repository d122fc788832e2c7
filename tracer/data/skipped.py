"""Pictures that failed during a run: which, in which batch, and why. Another picture stands in for each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from tracer.errors import UserError
from tracer.words import counted


class Skipped:
    """The pictures that failed, each from the batch on in which it first did.

    A picture that has failed is not tried again in later batches, even if it could be read by then. So a run that
    goes on from a checkpoint, with the rows of this list up to there, sees what an unbroken run sees. Threads may
    use it at the same time.

    Args:
        total: pictures of the data set.
        max_bad: share of them that may fail.
        rows: of an earlier attempt, as :meth:`rows` returns them.
        count: told the number of a picture that fails here for the first time, it returns how many have failed on
            all ranks since; without it there is one rank.
    """

    def __init__(
        self,
        total: int,
        max_bad: float,
        rows: Iterable[dict[str, Any]] = (),
        count: Callable[[int], int] | None = None,
    ) -> None:
        self._total, self._max_bad, self._guard, self._count = total, max_bad, threading.Lock(), count
        self._rows: dict[int, dict[str, Any]] = {}
        self.learn(rows)
        self._before = len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def has(self, row: int, batch: int) -> bool:
        """Return whether a picture has failed in this batch or an earlier one."""
        entry = self._rows.get(row)
        return entry is not None and entry["batch"] <= batch

    def add(self, row: int, batch: int, name: str, reason: str) -> None:
        """Note that a picture failed in a batch.

        Raises:
            UserError: more pictures have failed than ``max_bad`` allows; says how many, and the last reason.
        """
        with self._guard:
            new = row not in self._rows
            self._keep({"batch": batch, "row": row, "picture": name, "reason": reason})
            count = len(self._rows)
            if self._count is not None:
                count = self._before + self._count(row) if new else 0
        if count > max(self._max_bad * self._total, 0) or count >= self._total:
            raise UserError(
                f"{count} of {counted(self._total, 'picture')} failed during the run, more than --max_bad "
                f"{self._max_bad:g} allows, last '{name}' ({reason}): repair what failed, or raise --max_bad"
            )

    def _keep(self, entry: dict[str, Any]) -> None:
        known = self._rows.get(entry["row"])
        if known is None or entry["batch"] < known["batch"]:
            self._rows[entry["row"]] = entry

    def learn(self, rows: Iterable[dict[str, Any]]) -> None:
        """Take over what another rank or attempt has noted; of two batches with one picture, the earlier."""
        with self._guard:
            for row in rows:
                self._keep(row)

    def rows(self, before: int | None = None) -> list[dict[str, Any]]:
        """Return the entries of the batches before ``before``, or all, in the order of batches and pictures."""
        with self._guard:
            rows = [row for row in self._rows.values() if before is None or row["batch"] < before]
        return sorted(rows, key=lambda row: (row["batch"], row["row"]))
