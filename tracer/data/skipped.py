"""Pictures that failed during a run: which, in which batch, and why. Another picture stands in for each."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from tracer.errors import UserError


class Skipped:
    """The pictures that failed, each from the batch on in which it first did.

    A picture that has failed is not tried again in later batches, even if it could be read by then. So a run that
    goes on from a checkpoint, with the rows of this list up to there, sees what an unbroken run sees. Threads may
    use it at the same time.

    Args:
        total: pictures of the data set.
        max_bad: share of them that may fail.
        rows: of an earlier attempt, as :meth:`rows` returns them.
    """

    def __init__(self, total: int, max_bad: float, rows: Iterable[dict[str, Any]] = ()) -> None:
        self._total, self._max_bad, self._guard = total, max_bad, threading.Lock()
        self._rows = {row["row"]: row for row in rows}

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
            known = self._rows.get(row)
            if known is None or batch < known["batch"]:
                self._rows[row] = {"batch": batch, "row": row, "picture": name, "reason": reason}
            count = len(self._rows)
        if count > max(self._max_bad * self._total, 0) or count >= self._total:
            raise UserError(
                f"{count} of {self._total} pictures failed during the run, more than --max_bad {self._max_bad:g} "
                f"allows, last '{name}' ({reason}): repair them, or raise --max_bad"
            )

    def rows(self, before: int) -> list[dict[str, Any]]:
        """Return the entries of the batches before ``before``, in the order of batches and pictures."""
        with self._guard:
            rows = [row for row in self._rows.values() if row["batch"] < before]
        return sorted(rows, key=lambda row: (row["batch"], row["row"]))
