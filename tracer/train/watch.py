"""Signs of life beside the collectives: which rank was lost, which one is slow, and that no rank waits for ever.

A collective waits for a rank that is stopped or cut off until its timeout, and cannot say for which one. So each
rank has a thread that tells the store once a second where it is, and looks after one other, the next in a ring.
A rank that is killed is noticed at once by those on its host, by its process id. A rank that has lost the store,
and with it all others, ends by itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tracer.errors import Stopped, UserError
from tracer.train.guard import guard
from tracer.train.stop import StopRequest

TICK = 0.25  # seconds between two looks at the store
BEAT = 1.0  # seconds between two signs of life
SUSPECTED = 6.0  # seconds without a sign of life that will do where a connection has just been lost
LINGER = 5.0  # seconds that a rank gives the others to read the last word, or to say the same
SLOW_FACTOR, SLOW_LEAST = 1.5, 0.05  # a step's own work: times the median of all, and seconds beyond it
SLOW_STEPS = 10  # steps over which that is measured
REPORT_EVERY = 300.0  # seconds between two reports of the same kind about a rank
KILLED = "its process has ended without a word: it was killed, perhaps for want of memory"
STOPPED = "its process is stopped"
PHASES = ("starts", "loads its pictures", "computes", "evaluates", "saves")


class Watch:
    """This rank's signs of life, and its eyes on the others; :meth:`start` begins, :meth:`leave` ends it.

    Args:
        rank, size, local_rank, local_size: of this process.
        store: key-value store of all ranks, which this object alone uses.
        limit: seconds without a sign of life after which a rank counts as lost.
        end: ends the process.
        say: prints a line.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        local_rank: int,
        local_size: int,
        store: Any,
        limit: float,
        end: Callable[[], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.rank, self.size, self._store, self._limit = rank, size, store, limit
        first = rank - local_rank
        self._neighbours = [r for r in range(first, min(first + local_size, size)) if r != rank]
        self._end, self._say = end or _end, say or _say
        self._over, self._ending = threading.Event(), threading.Lock()
        self._threads: list[threading.Thread] = []
        self._where = (0, 0)  # step, number of the phase
        self._own: list[float] = []  # seconds of this rank's own work in the last steps
        self._began = time.monotonic()  # the present phase
        self._beats = 0
        self._contact = self._turn = time.monotonic()
        self._suspicious = False  # an error of this rank says that its connection to another is lost
        self._about: dict[int, dict[str, Any]] = {}
        self._seen: dict[int, tuple[Any, float]] = {}  # rank → last beat, since when
        self._reached: dict[int, tuple[Any, float]] = {}  # rank → its place in the run, since when
        self._left: set[int] = set()
        self._reported: dict[tuple[int, str], float] = {}
        self.request: StopRequest | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    # --- what the training loop says

    def at(self, step: int, phase: str) -> None:
        """Say where this rank is: in which step, and in which of the ``PHASES``."""
        self._where, self._began = (step, PHASES.index(phase)), time.monotonic()

    def own_work(self, seconds: float) -> None:
        """Say how long this rank took in a step for what it does without the others."""
        self._own = [*self._own[1 - SLOW_STEPS :], seconds]

    # --- life and death

    def start(self) -> None:
        """Introduce this rank to the others, and begin to watch."""
        about = {
            "host": socket.gethostname(),
            "space": _process_space(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
        }
        self._store.set(f"about {self.rank}", json.dumps(about))
        self._beat()
        if not self._neighbours:
            self._guard = guard(os.getpid(), self._limit)
        for other in {*self._neighbours, (self.rank + 1) % self.size, 0}:
            self._meet(other)
        for work in (self._run, self._mind_the_contact):
            self._threads.append(threading.Thread(target=work, name=f"tracer {work.__name__}", daemon=True))
            self._threads[-1].start()

    def leave(self, error: BaseException | None = None, together: bool = False) -> None:
        """End the watch: this rank has done its work, or an error ends it.

        Args:
            error: what ends this rank.
            together: all ranks know of the error, and end by it; otherwise they are told to end.
        """
        if together:
            self._close()
            with suppress(Exception):
                if isinstance(error, Stopped):
                    self._wait_for_others()  # some may still be asking where to stop
                else:
                    self._store.set(f"left {self.rank}", "")
            return
        if error is not None:
            self._give_way_to_a_lost_rank(error)
            reason = f"{type(error).__name__}: {_first_line(error)}"
            asked = isinstance(
                error, (UserError, Stopped, KeyboardInterrupt)
            )  # the command line speaks of these
            line = self._lose(self.rank, reason, spoken=True, refusal=asked)
            if line and not asked:
                self._say(line)
        self._close()
        with suppress(Exception):  # the store may be gone with the rank that held it
            self._wait_for_others()

    def _close(self) -> None:
        """End the threads: one in the midst of a call to the store would abort the process at its exit."""
        self._over.set()
        for thread in self._threads:
            thread.join(2.0)
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()

    def _give_way_to_a_lost_rank(self, error: BaseException) -> None:
        """Wait while another rank may turn out to have been lost, of which ``error`` is then the consequence."""
        if threading.current_thread() is threading.main_thread():
            # The launcher ends all its ranks once one has died; this one has yet to say which.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        text = f"{type(error).__name__} {error}".lower()
        words = ("gloo", "nccl", "connection", "peer", "socket", "store", "timed out", "process group")
        if not isinstance(error, UserError) and any(word in text for word in words):
            self._suspicious = True
            wait_for = min(self._limit, 10.0) + 10.0
        else:
            wait_for = 3 * TICK
        patience = time.monotonic() + wait_for
        while time.monotonic() < patience:  # the other thread ends this process
            time.sleep(TICK)

    # --- the thread

    def _run(self) -> None:
        next_beat = next_survey = 0.0
        while not self._over.wait(TICK):
            if (begins := time.monotonic()) - self._turn > self._limit / 2:
                # This process has stood still itself, its job suspended or its host asleep: so have others.
                self._seen.clear()
                self._reached.clear()
            self._turn = begins
            try:
                if self.request is not None:
                    self.request.tick(self._store)
                self._mind_the_verdict()
                self._mind_the_neighbours()
                if (now := time.monotonic()) >= next_beat:
                    self._beat()
                    self._mind_the_next()
                    next_beat = now + BEAT
                if self.rank == 0 and now >= next_survey:
                    self._survey()
                    next_survey = now + min(5 * BEAT, self._limit / 8)
                self._contact = time.monotonic()
            except Exception as error:  # the store is gone, perhaps since all ranks are about to leave
                if not self._over.wait(4 * TICK):
                    self._end_without_store(f"the connection is closed ({_first_line(error)})")

    def _mind_the_contact(self) -> None:
        before = time.monotonic()
        while not self._over.wait(TICK):
            now = time.monotonic()
            if now - before > self._limit / 2:  # this process has stood still itself
                self._contact = now
            before = now
            if now - self._contact > self._limit:
                self._end_without_store(
                    f"no contact for {self._limit:g} s: the network is cut, or its host is down"
                )

    def _beat(self) -> None:
        self._beats += 1
        own = statistics.mean(self._own) if len(self._own) == SLOW_STEPS else None
        self._store.set(f"beat {self.rank}", json.dumps([self._beats, *self._where, own]))

    def _mind_the_verdict(self) -> None:
        """End with the others, once any rank has found one to be lost."""
        if self._store.check(["lost"]):
            lost = json.loads(self._store.get("lost"))
            if lost["refusal"] and self._over.wait(LINGER):  # this rank was about to end by the same
                return
            speaks = not lost["spoken"] and self._store.add("last word", 1) == 1
            self._end_if_stopped(lost["rank"])
            if speaks:
                self._say(lost["line"])
            self._wait_for_others(lost["rank"])
            self._finish()

    def _mind_the_neighbours(self) -> None:
        for other in self._neighbours:
            if other not in self._left and self._is_gone(other) and not self._has_left(other):
                self._lose(other, KILLED)

    def _mind_the_next(self) -> None:
        """Look at the next rank of the ring that has not left."""
        others = ((self.rank + n) % self.size for n in range(1, self.size))
        other = next((r for r in others if r not in self._left and not self._has_left(r)), None)
        if other is None:
            return
        self._meet(other)
        beat = json.loads(self._store.get(f"beat {other}"))
        before, since = self._seen.get(other, (None, 0.0))
        if before != beat[0]:
            self._seen[other] = beat[0], time.monotonic()
            return
        age = self._turn - since
        limit = min(self._limit, SUSPECTED) if self._suspicious else self._limit
        if age > limit:
            why = STOPPED if self._is_stopped(other) else f"{STOPPED}, or its host or network is down"
            self._lose(other, f"no sign of life for {age:.0f} s: {why}")

    def _lose(self, other: int, reason: str, spoken: bool = False, refusal: bool = False) -> str:
        """Say that a rank is lost, so that all end; returns the line that says so, "" if another was faster.

        ``spoken``: the rank says so itself. ``refusal``: it ends by what the user gave or by a signal, and the
        others may be about to end by the same.
        """
        with suppress(Exception):  # without a store each host ends by itself
            # The ranks go in step, so this rank's is newer than the lost one's last sign of life.
            line = _line(other, self._meet(other)["host"], self._where[0], reason)
            lost = json.dumps({"rank": other, "line": line, "spoken": spoken, "refusal": refusal})
            return line if self._store.compare_set("lost", "", lost).decode() == lost else ""
        return ""

    def _finish(self) -> None:
        self._over.set()
        self._end()

    def _wait_for_others(self, without: int = -1) -> None:
        """Let the others read why all end, before this rank takes the store with it."""
        self._store.set(f"left {self.rank}", "")
        keys = [f"left {rank}" for rank in range(self.size) if rank != without]
        patience = time.monotonic() + 2 * LINGER  # another may linger itself before it leaves
        while self.rank == 0 and time.monotonic() < patience and not self._store.check(keys):
            time.sleep(TICK)

    def _end_without_store(self, reason: str) -> None:
        """End this rank; of each host the first rank that lives speaks."""
        with self._ending:  # both threads may find it out
            if self._over.is_set():
                return
            self._over.set()
        alive = [r for r in self._neighbours if self._about.get(r) and not self._is_gone(r) and r]
        host = self._about.get(0, {}).get("host", "?")
        if 0 in self._neighbours and self._is_gone(0):
            reason = KILLED
        elif 0 in self._neighbours and self._is_stopped(0):
            reason = f"no contact for {self._limit:g} s: {STOPPED}"
        line = _line(
            0, host, self._where[0], reason, seen_by=f"rank {self.rank} on host {socket.gethostname()}"
        )
        if self.rank <= min(alive, default=self.rank):
            self._say(line)
            self._end_if_stopped(0)
            time.sleep(LINGER)  # the others of this host are silent as long as this rank lives
        self._finish()

    # --- what is known of others

    def _meet(self, other: int) -> dict[str, Any]:
        if other not in self._about:
            self._about[other] = json.loads(self._store.get(f"about {other}"))
        return self._about[other]

    def _has_left(self, other: int) -> bool:
        if self._store.check([f"left {other}"]):
            self._left.add(other)
        return other in self._left

    def _is_neighbour(self, other: int) -> bool:
        """Return whether the process id of ``other`` means something here."""
        about = self._about.get(other)
        return about is not None and about["space"] == _process_space()

    def _is_gone(self, other: int) -> bool:
        if not self._is_neighbour(other):
            return False
        pid = self._about[other]["pid"]
        return _state(pid) in "ZX" or _born(pid) != self._about[other]["born"]

    def _is_stopped(self, other: int) -> bool:
        return self._is_neighbour(other) and _state(self._about[other]["pid"]) in "Tt"

    def _end_if_stopped(self, other: int) -> None:
        """End a lost rank of this host that is stopped: it obeys nothing else, and launchers wait for it."""
        if self._is_stopped(other):
            os.kill(self._about[other]["pid"], signal.SIGKILL)

    # --- slow ranks

    def _survey(self) -> None:
        """Report ranks that keep the others waiting; they are not lost."""
        ranks = [r for r in range(self.size) if r not in self._left]
        beats = dict(
            zip(ranks, map(json.loads, self._store.multi_get([f"beat {r}" for r in ranks])), strict=True)
        )
        places = {r: (beat[1], beat[2]) for r, beat in beats.items()}
        now = time.monotonic()
        for r, place in places.items():
            before, since = self._reached.get(r, (None, now))
            self._reached[r] = (place, since if before == place else now)
        behind = min(places.values())
        late = [r for r, place in places.items() if place == behind]
        if len(late) < self.size / 2 and behind[1]:
            for r in late:
                waited = now - self._reached[r][1]
                if waited > self._limit / 2:
                    what = f"{PHASES[behind[1]]} for {waited:.0f} s in step {behind[0]} while the others wait"
                    self._report(r, "waits", what)
        own = {r: beat[3] for r, beat in beats.items() if beat[3] is not None}
        if len(own) > 1:
            for r, seconds in own.items():
                median = statistics.median(s for other, s in own.items() if other != r)
                if seconds > SLOW_FACTOR * median and seconds > median + SLOW_LEAST:
                    what = f"takes {seconds:.2g} s for its own part of a step, the others {median:.2g} s"
                    self._report(r, "own", what)

    def _report(self, other: int, kind: str, what: str) -> None:
        now = time.monotonic()
        if now - self._reported.get((other, kind), -REPORT_EVERY) >= REPORT_EVERY:
            self._reported[other, kind] = now
            self._say(f"tracer: warning: rank {other} on host {self._meet(other)['host']} is slow: it {what}")


def _line(rank: int, host: str, step: int, reason: str, seen_by: str = "") -> str:
    by = f" (says {seen_by})" if seen_by else ""
    return (
        f"tracer: error: rank {rank} on host {host} was lost in step {step}: {reason}{by}; all ranks end, and the "
        "same command goes on from the last checkpoint"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _end() -> None:
    """End the process at once: its main thread may wait in a collective, where no exception reaches it."""
    sys.stderr.flush()
    os._exit(1)


def _say(line: str) -> None:
    os.write(2, f"\n{line}\n".encode())  # the bar of the main thread may be in the midst of a line


def _process_space() -> str:
    """Return what tells this machine's process ids from those of other machines and containers."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return socket.gethostname()


def _stat(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _state(pid: int) -> str:
    """Return the letter of a process's state; X where there is none of this id."""
    return next(iter(_stat(pid)), "X")


def _born(pid: int) -> str:
    """Return when a process was started, in the system's ticks: another process may get its id."""
    return (_stat(pid) + [""] * 20)[19]
