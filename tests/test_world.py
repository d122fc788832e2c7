"""The worlds of ranks themselves: what a signal kills runs once more, what fails does not."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
import world


def cases(_world_size: int) -> dict[str, Callable[[], None]]:
    """Return cases of which one kills a rank as often as the file beside the results says."""
    left = Path(tempfile.gettempdir()) / "kills"  # the folder of the results, see world.rank_main

    def killed() -> None:
        dist.barrier()
        if dist.get_rank() == 1 and (kills := int(left.read_text())):
            left.write_text(str(kills - 1))
            os.kill(os.getpid(), signal.SIGKILL)

    def wrong() -> None:
        raise ValueError("wrong")

    return {"first": dist.barrier, "killed": killed, "wrong": wrong, "last": dist.barrier}


@pytest.mark.parametrize("kills", [1, 2])
def test_what_a_signal_kills_runs_once_more(tmp_path, kills):
    (tmp_path / "kills").write_text(str(kills))
    names = ["first", "killed", "wrong", "last"]
    with pytest.warns(
        UserWarning, match="terminated with signal SIGKILL, in killed: it and the cases after it"
    ):
        found = world._run("test_world", 2, names, tmp_path)
    assert list(found) == names
    assert found["first"] == ""
    if kills == 1:
        assert found["killed"] == found["last"] == ""
        assert "ValueError: wrong" in found["wrong"]
    else:
        assert all("terminated with signal SIGKILL" in found[name] for name in names[1:])
