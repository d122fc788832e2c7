"""Worlds of ranks for tests: a world is started once and runs all of its cases that are selected, by name.

Starting processes is what costs. A module of cases has ``cases(world_size) -> dict[str, Callable[[], None]]``:
every case raises where something is wrong, and all ranks run the same cases in the same order. Its test is::

    outcomes = world.outcomes("my_cases")

    @pytest.mark.parametrize(("ranks", "case"), ...)
    def test_it(outcomes, ranks, case):
        world.check(outcomes, ranks, case)
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A rank that fails within a case leaves the others waiting in a collective for as long as this.
PATIENCE = timedelta(seconds=90)


def outcomes(module: str) -> Callable[..., Any]:
    """Return a fixture that gives, for a number of ranks, the outcome of each selected case: "" if it passed."""

    @pytest.fixture(scope="module")
    def fixture(request, tmp_path_factory) -> Callable[[int], dict[str, str]]:
        forked.context()  # starts the server that the ranks are forked from
        mine = [item for item in request.session.items if item.module is request.module]
        selected = [item.callspec.params for item in mine if hasattr(item, "callspec")]

        @lru_cache
        def of(ranks: int) -> dict[str, str]:
            names = [params["case"] for params in selected if "case" in params and params["ranks"] == ranks]
            return _run(module, ranks, names, tmp_path_factory.mktemp("world"))

        return of

    return fixture


def check(outcomes: Callable[[int], dict[str, str]], ranks: int, case: str) -> None:
    """Fail with what went wrong in a case."""
    if problem := outcomes(ranks)[case]:
        pytest.fail(problem, pytrace=False)


def _run(module: str, ranks: int, names: list[str], folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for last in (False, True):
        left = [name for name in names if name not in found]
        lost, killed = _run_once(module, ranks, left, folder)
        found |= json.loads((folder / "results.json").read_text())
        left = [name for name in left if name not in found]
        if last or not killed or not left:
            break
        # A thread of gloo crashes in malloc once in many worlds (docs/hosts.md): a second crash is a failure.
        warnings.warn(f"{lost}, in {left[0]}: it and the cases after it run once more", stacklevel=2)
    return dict.fromkeys(names, lost) | found


def _run_once(module: str, ranks: int, names: list[str], folder: Path) -> tuple[str, bool]:
    """Run cases in a new world; return why some may have no outcome, and whether a signal killed a rank."""
    results = folder / "results.json"
    results.write_text("{}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        arguments = (ranks, port, module, names, results)
        mp.start_processes(rank_main, arguments, nprocs=ranks, start_method="forkserver")
    except mp.ProcessExitedException as error:
        return str(error), error.exit_code < 0
    except mp.ProcessRaisedException as error:
        return str(error), False
    return "the ranks parted in an earlier case", False


def rank_main(rank: int, world_size: int, port: int, module: str, names: list[str], results: Path) -> None:
    """Run the cases ``names``; rank 0 keeps ``results`` up to date: JSON, name -> "" or what went wrong.

    A case that fails on every rank fails alone. Ranks that part, where a case fails on some of them only, can no
    longer communicate: the cases after that are not run.
    """
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    tempfile.tempdir = str(results.parent)
    warnings.filterwarnings("ignore", module="(deepspeed|torch)")
    dist.init_process_group("gloo", timeout=PATIENCE)
    # Outcomes travel past the process group, which a failed case may leave in the midst of a collective.
    said_by = dist.TCPStore("127.0.0.1", port, timeout=2 * PATIENCE, wait_for_workers=False)
    table, result = importlib.import_module(module).cases(world_size), {}
    for name in names:
        said_by.set(f"{name} {rank}", _outcome(table[name]))
        said = [said_by.get(f"{name} {other}").decode() for other in range(world_size)]
        result[name] = "\n".join(f"rank {r}: {text}" for r, text in enumerate(said) if text)
        if rank == 0:
            results.write_text(json.dumps(result))
        if any(said) and not all(said):
            return
    dist.barrier()
    dist.destroy_process_group()


def _outcome(case: Callable[[], None]) -> str:
    try:
        case()
    except Exception:
        return traceback.format_exc()
    return ""
