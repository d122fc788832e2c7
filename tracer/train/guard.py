"""A process beside a rank that is alone on its host: it ends the rank where nobody else could.

A stopped process obeys SIGKILL alone, and only a process of the same host can send it. Where a host has several
ranks, the others do so. This file is run by itself, without the project, so that it costs a few megabytes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

LOOK = 0.5  # seconds between two looks at the rank


def guard(pid: int, limit: float) -> subprocess.Popen[bytes]:
    """Start a process that kills this one, ``pid``, once it has been stopped for ``limit`` seconds.

    It ends by itself when this process does.
    """
    command = [sys.executable, "-I", "-S", __file__, str(pid), str(limit)]
    null = subprocess.DEVNULL  # whoever reads what the rank says need not wait for the guard
    return subprocess.Popen(command, stdin=null, stdout=null, stderr=null)


def _stopped(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def main(pid: int, limit: float) -> None:
    """Look after the process that has started this one."""
    looks = 0  # not a clock: a host that sleeps, or a job that is suspended, stops this process too
    while os.getppid() == pid:
        looks = looks + 1 if _stopped(pid) else 0
        if looks * LOOK > limit:
            os.kill(pid, signal.SIGKILL)
        time.sleep(LOOK)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
