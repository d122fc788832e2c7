"""Stop at the next step boundary when the system or the user asks for it, so that the work so far can be saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # of Slurm and Kubernetes; of Ctrl-C


class StopRequest:
    """Says whether a signal has asked the process to stop.

    Args:
        quiet: say nothing when one comes, since another rank does.

    Attributes:
        signal: number of the signal, None until one has come.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.signal: int | None = None
        self._quiet = quiet

    def note(self, number: int, _: FrameType | None) -> None:
        """Handle a signal: the first is noted, a second ends the process at once, as Ctrl-C does by default."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        if self._quiet:
            return
        # Not print: the handler may run in the midst of one.
        os.write(2, b"\ntracer: saving after this step, then stopping; a second signal stops at once\n")


@contextmanager
def stop_requests(quiet: bool = False) -> Iterator[StopRequest]:
    """Yield a request that notes SIGTERM and Ctrl-C as long as the block runs; only in the main thread."""
    request = StopRequest(quiet)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
