"""Ranks that agree: in threads for the agreement itself, under torchrun for the one line that a mistake prints."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tracer.cli import main
from tracer.errors import Refused, UserError
from tracer.train.identity import Identity
from tracer.train.ranks import Ranks, check_batch_size
from tracer.train.run import _check_alike


def together(size: int, work: Callable[[Ranks], Any], per_host: int = 8) -> list[Any]:
    """Return what ``work`` returns on each of ``size`` ranks, or the error that it raises there."""
    store, results = dist.HashStore(), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(Ranks(rank, size, rank % per_host, store))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a rank waits for ever"
    return results


def fails_on(ranks: set[int], here: Ranks) -> int:
    if here.rank in ranks:
        raise UserError(f"rank {here.rank} cannot")
    return here.rank


@pytest.mark.parametrize("size", [1, 2, 5])
def test_work_that_is_done_once_reaches_all(size):
    calls: list[int] = []
    results = together(
        size, lambda here: [here.once(lambda: [here.rank, 7]), here.once(lambda: calls.append(0))]
    )
    assert results == [[[0, 7], None]] * size
    assert calls == [0]


@pytest.mark.parametrize("failing", [{0}, {1}, {1, 2}, {0, 1, 2}])
def test_what_fails_on_a_rank_fails_on_all_and_once_is_said(failing):
    """With its own error there; the others end without a word."""

    def work(here: Ranks) -> int:
        try:
            return here.agree(lambda: fails_on(failing, here))
        except Exception as error:
            if not isinstance(error, Refused) and here.speaks():
                said.append(str(error))
            raise

    said: list[str] = []
    results = together(3, work)
    assert len(said) == 1
    for rank, result in enumerate(results):
        assert isinstance(result, UserError)
        assert isinstance(result, Refused) == (rank not in failing)


def test_a_failure_of_the_first_rank_ends_those_that_wait_for_its_work():
    results = together(3, lambda here: here.once(lambda: fails_on({0}, here)))
    assert [type(result) for result in results] == [UserError, Refused, Refused]


def test_the_first_rank_of_each_host_goes_before_the_others():
    order: list[int] = []

    def work(here: Ranks) -> int:
        def load() -> int:
            time.sleep(0.1 if here.local_rank == 0 else 0)
            order.append(here.rank)
            return here.rank

        return here.leaders_first(load)

    assert together(6, work, per_host=3) == list(range(6))
    for leader in (0, 3):
        assert all(order.index(leader) < order.index(rank) for rank in (leader + 1, leader + 2))
    results = together(4, lambda here: here.leaders_first(lambda: fails_on({2}, here)), per_host=2)
    assert [type(result) for result in results] == [Refused, Refused, UserError, Refused]


def test_all_ranks_count_distinct_numbers_without_waiting_for_each_other():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    first, second = (Ranks(rank, 2, rank, store).counter() for rank in range(2))
    assert [first(7), first(7), first(9), second(7), second(0), first(0)] == [1, 1, 2, 2, 3, 3]
    assert Ranks().counter() is None


def test_a_batch_is_shared_equally():
    check_batch_size(12, 4)
    with pytest.raises(UserError, match=r"--batch_size 14 is .* by 4 ranks equally: give 12 or 16, or start"):
        check_batch_size(14, 4)
    with pytest.raises(UserError, match=r"equally: give 4, or start"):
        check_batch_size(3, 4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"settings": {"lr": 2.0}}, r"--lr (on rank 0 1.0, here 2.0)"),
        ({"files": {"--train_data": "another digest"}}, "--train_data (its content)"),
        ({"versions": {"torch": "3.0"}}, "torch (on rank 0 2.14, here 3.0)"),
    ],
    ids=["settings", "data", "versions"],
)
def test_a_rank_that_was_started_otherwise_is_named(changes, says):
    first = Identity(settings={"lr": 1.0}, files={"--train_data": "a digest"}, versions={"torch": "2.14"})
    _check_alike(first, first, Ranks(3, 4))
    with pytest.raises(UserError) as e:
        _check_alike(dataclasses.replace(first, **changes), first, Ranks(3, 4))
    assert re.fullmatch(
        rf"rank 3 on host \S+ differs from rank 0 in {re.escape(says)}: start all .*", str(e.value)
    )


def test_other_commands_run_in_one_process(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["pretrain", "--output", str(tmp_path)]) == 2
    assert "tracer pretrain runs in one process: start it without torchrun" in capsys.readouterr().err


def test_a_rank_with_a_mistake_waits_for_the_first_one_to_say_it(monkeypatch, capsys):
    """The launcher ends all ranks as soon as one has ended."""
    waits: list[float] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delitem(sys.modules, "tracer.train.ranks")
    monkeypatch.setattr("tracer.cli.time.sleep", waits.append)
    assert main(["finetune", "--lr", "fast"]) == 2
    assert waits == [30]
    assert capsys.readouterr().err == ""


def torchrun(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*command, "-m", "tracer", "--local_rank=0", "finetune", *map(str, options)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=180)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": "fast"}, "Given value: fast"),
        ({"output": "."}, "exists: choose another --output"),
    ],
    ids=["option", "output"],
)
def test_a_mistake_is_one_line_on_several_ranks(config, drawings, changes, says):
    """Whether all ranks see it or the first alone."""
    settings = {
        "train_data": drawings / "train.csv", "model": config.model, "pretrained": config.pretrained, "steps": 2,
        "warmup": 0, "batch_size": 32, "output": config.output, "precision": "fp32",
    } | changes  # fmt: skip
    result = torchrun(*(f"--{name}={value}" for name, value in settings.items()))
    assert result.returncode != 0
    ours = [line for line in result.stderr.splitlines() if line.startswith("tracer: ")]
    errors = [line for line in ours if "error" in line]
    assert len(errors) == 1, result.stderr
    assert says in errors[0]
    assert "rank0]: Traceback" not in result.stderr
    assert "rank1]: Traceback" not in result.stderr
    assert not Path(f"{config.output}.part").exists()
