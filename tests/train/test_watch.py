"""Ranks that are killed, stopped, slow or fail: all others end, and one line says which rank it was, and why."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import watched_ranks


def all_end(ranks, within: float) -> list[int]:
    patience = time.monotonic() + within
    for process in ranks:
        process.join(max(0.1, patience - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes


def said(folder: Path) -> list[str]:
    lines = [line for file in sorted(folder.glob("*.err")) for line in file.read_text().splitlines()]
    return [line for line in lines if line.startswith("tracer: ")]


LINE = (
    r"tracer: error: rank {} on host \S+ was lost in step {}: {}; all ranks end, and the same command goes on "
    "from the last checkpoint"
)
KILLED = "its process has ended without a word: it was killed, perhaps for want of memory"


@pytest.mark.parametrize(
    ("fault", "reason", "own"),
    [
        ("killed", KILLED, -signal.SIGKILL),
        ("stopped", r"no sign of life for \d+ s: its process is stopped", -signal.SIGKILL),
        ("fails", "MemoryError: no memory for a batch", 3),
    ],
    ids=["killed", "stopped", "fails"],
)
def test_a_lost_rank_ends_all_and_is_named_once(tmp_path, fault, reason, own):
    """Long before the collectives' own timeout; the limit here is 3 s instead of 20."""
    codes = all_end(watched_ranks.start(3, tmp_path, 3.0, fault), within=120)
    assert codes == [1, own, 1]
    assert len(said(tmp_path)) == 1
    assert re.fullmatch(LINE.format(1, 5, reason), said(tmp_path)[0])


def test_the_rank_that_holds_the_store_may_be_lost_too(tmp_path):
    ranks = watched_ranks.start(3, tmp_path, 3.0)
    wait_for_step(tmp_path, 3)
    os.kill(ranks[0].pid, signal.SIGKILL)
    assert all_end(ranks, within=120) == [-signal.SIGKILL, 1, 1]
    assert len(said(tmp_path)) == 1, said(tmp_path)
    (line,) = said(tmp_path)
    assert re.fullmatch(LINE.format(0, r"\d+", rf"{KILLED}( \(says rank 1 on host \S+\))?"), line)


def test_the_rank_that_holds_the_store_may_be_stopped_too(tmp_path):
    """Regression: all others ended, and it stayed for ever."""
    ranks = watched_ranks.start(3, tmp_path, 3.0)
    wait_for_step(tmp_path, 3)
    os.kill(ranks[0].pid, signal.SIGSTOP)
    assert all_end(ranks, within=60) == [-signal.SIGKILL, 1, 1]
    (line,) = said(tmp_path)
    assert re.fullmatch(
        LINE.format(0, r"\d+", r"no contact for 3 s: its process is stopped \(says rank 1 on .*\)"), line
    )


def test_a_rank_that_is_stopped_alone_on_its_host_ends_too(tmp_path):
    """Regression: no process of another host can end it, and it stayed for ever."""
    ranks = watched_ranks.start(3, tmp_path, 3.0, "stopped", hosts=True)
    assert all_end(ranks, within=60) == [1, -signal.SIGKILL, 1]
    (line,) = said(tmp_path)
    reason = r"no sign of life for \d+ s: its process is stopped, or its host or network is down"
    assert re.fullmatch(LINE.format(1, 5, reason), line)


def test_a_job_that_is_suspended_as_a_whole_goes_on(tmp_path):
    """As Slurm suspends one. Regression: each rank took the time for silence of the others, and ended all."""
    ranks = watched_ranks.start(3, tmp_path, 3.0)
    wait_for_step(tmp_path, 3)
    for number, pause in ((signal.SIGSTOP, 6.0), (signal.SIGCONT, 0.0)):
        for process in ranks:
            os.kill(process.pid, number)
        time.sleep(pause)
    wait_for_step(tmp_path, int((tmp_path / "1.step").read_text()) + 100)
    for process in ranks:
        os.kill(process.pid, signal.SIGTERM)
    assert all_end(ranks, within=60) == [0, 0, 0]
    assert not said(tmp_path)


def test_both_sides_of_a_cut_link_end_and_say_so(tmp_path):
    with watched_ranks.cut_link(3, tmp_path, 3.0) as (ranks, link):
        wait_for_step(tmp_path, 3)
        link.cut()
        assert all_end(ranks, within=60) == [1, 1, 1]
    here, there = said(tmp_path)
    reason = r"no sign of life for \d+ s: its process is stopped, or its host or network is down"
    assert re.fullmatch(LINE.format(2, r"\d+", reason), here)
    reason = r"no contact for 3 s: the network is cut, or its host is down \(says rank 2 on host \S+\)"
    assert re.fullmatch(LINE.format(0, r"\d+", reason), there)


def test_what_all_ranks_refuse_each_of_them_refuses_itself(tmp_path):
    """Regression: the first to refuse ended the others, which were seconds behind on a busy machine."""
    assert all_end(watched_ranks.start(3, tmp_path, 20.0, "refused by all"), within=120) == [3, 3, 3]
    assert not said(tmp_path)  # the command line speaks


@pytest.mark.parametrize(
    ("fault", "codes"),
    [
        ("is asked to stop", [1, 143, 1]),
        ("is interrupted", [1, 130, 1]),
        ("first is asked to stop", [143, 1, 1]),
    ],
)
def test_a_rank_that_is_stopped_by_itself_ends_the_others(tmp_path, fault, codes):
    """Before the training, where ranks do not agree. Regression: the others waited for it in a collective."""
    assert all_end(watched_ranks.start(3, tmp_path, 20.0, fault), within=60) == codes
    assert not said(tmp_path)  # the command line speaks


def wait_for_step(folder: Path, step: int) -> None:
    patience = time.monotonic() + 120
    while time.monotonic() < patience:
        if (path := folder / "1.step").exists() and int(path.read_text() or 0) >= step:
            return
        time.sleep(0.01)
    raise AssertionError("the ranks do not begin")


def test_a_slow_rank_is_reported_and_not_ended(tmp_path):
    ranks = watched_ranks.start(3, tmp_path, 2.0, "slow")  # 4 s in its step 5: beyond the limit
    wait_for_step(tmp_path, 20)
    for process in ranks:
        os.kill(process.pid, signal.SIGTERM)
    assert all_end(ranks, within=120) == [0, 0, 0]
    (line,) = said(tmp_path)
    assert re.fullmatch(
        r"tracer: warning: rank 1 on host \S+ is slow: it loads its pictures for \d s in .*", line
    )


@pytest.mark.parametrize("first", [0, 1, 2])
def test_all_ranks_stop_at_the_same_point_whoever_is_signalled(tmp_path, first):
    """One rank alone is signalled, as a launcher does that goes from one to the next; then all, again."""
    ranks = watched_ranks.start(3, tmp_path, 20.0)
    wait_for_step(tmp_path, 3)
    os.kill(ranks[first].pid, signal.SIGTERM)
    time.sleep(0.05)
    for process in ranks:
        os.kill(process.pid, signal.SIGTERM)
    assert all_end(ranks, within=120) == [0, 0, 0]
    ends = [json.loads((tmp_path / f"{rank}.end").read_text()) for rank in range(3)]
    assert len({end["step"] for end in ends}) == 1
    assert not said(tmp_path)
