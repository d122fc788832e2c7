"""Stop where the system or the user asks for it, at the same point on all ranks, so that the work is saved.

A launcher signals one rank after another, and a step may take minutes. So the ranks agree on a point within the
step: each counts the points that it has passed. Once a rank has a signal, every rank stops passing points and
says how many it has passed. The most of these, plus one, is the point at which all stop: no rank has passed it,
and every rank gets there, since what lies before it is the same for all.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # of Slurm and Kubernetes; of Ctrl-C
AGAIN = (
    1.0  # seconds after which another Ctrl-C is one more of the user's, not the launcher's echo of the first
)


class StopHere(Exception):
    """All ranks stop at this point of a step."""


class StopRequest:
    """Says whether a signal has asked the run to stop, and where its ranks do so.

    Args:
        quiet: say nothing when one comes, since another rank does.
        rank, size: of this process.

    Attributes:
        signal: number of the signal, None until one has come to this rank or, once agreed, to any.
    """

    def __init__(self, quiet: bool = False, rank: int = 0, size: int = 1) -> None:
        self.signal: int | None = None
        self._quiet, self._rank, self._size = quiet, rank, size
        self._noted = 0.0
        self._changed = threading.Condition()
        self._passed, self._closed = 0, False
        self._target: int | None = None

    def note(self, number: int, _: FrameType | None) -> None:
        """Handle a signal: note the first. A second Ctrl-C ends the process at once; SIGTERM may come again."""
        if self.signal is not None:
            if number == signal.SIGINT and time.monotonic() - self._noted > AGAIN:
                raise KeyboardInterrupt
            return
        self.signal, self._noted = number, time.monotonic()
        if self._quiet:
            return
        # Not print: the handler may run in the midst of one.
        os.write(2, b"\ntracer: saving, then stopping; a second Ctrl-C stops at once\n")

    def point(self) -> None:
        """Pass a point of a step at which a run may stop: every rank passes the same ones in the same order.

        Raises:
            StopHere: it is the one at which all ranks stop.
        """
        if self._size == 1:
            if self.signal is not None:
                raise StopHere
            return
        with self._changed:
            while self._closed and self._target is None:
                self._changed.wait(1.0)
            self._passed += 1
            if self._passed == self._target:
                raise StopHere

    def leave_off(self) -> None:
        """Leave work off that one rank does while the others wait, if the run stops at the next point.

        Raises:
            StopHere: it does. The caller tells the others, and passes that point as they do.
        """
        if self._closed or (self._size == 1 and self.signal is not None):
            raise StopHere

    def tick(self, store: Any) -> None:
        """Take part in the agreement of the ranks; the watch calls this a few times a second, in its thread."""
        if self._target is not None or self._size == 1:
            return
        if self.signal is not None and not self._closed:
            store.compare_set("stop", "", str(int(self.signal)))
        if not self._closed and store.check(["stop"]):
            with self._changed:
                self._closed, passed = True, self._passed
            store.set(f"passed {self._rank}", str(passed))
        if not self._closed:
            return
        keys = [f"passed {rank}" for rank in range(self._size)]
        if self._rank == 0 and store.check(keys):
            store.set("target", json.dumps(max(int(passed) for passed in store.multi_get(keys)) + 1))
        if store.check(["target"]):
            self.signal = self.signal or int(store.get("stop"))
            with self._changed:
                self._target = int(store.get("target"))
                self._changed.notify_all()


@contextmanager
def stop_requests(quiet: bool = False, rank: int = 0, size: int = 1) -> Iterator[StopRequest]:
    """Yield a request that notes SIGTERM and Ctrl-C as long as the block runs; only in the main thread."""
    request = StopRequest(quiet, rank, size)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
