"""The teacher under DeepSpeed ZeRO 0 to 3, on 1, 2 and 4 ranks (gloo): see zero_cases.py for the cases.

Starting processes and DeepSpeed is what costs here, so each world of ranks is started once and runs all of the
cases that are selected.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch.multiprocessing as mp
import zero_cases
import zero_worker

# DeepSpeed is imported once, in a server that the ranks are forked from, instead of seven times.
multiprocessing.set_forkserver_preload(["zero_worker"])

CASES = [(ranks, name) for ranks in (1, 2, 4) for name in zero_cases.cases(ranks)]


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> Callable[[int], dict[str, str]]:
    """Return a function that starts a world of ranks once, with the cases that are selected.

    From its number of ranks to: case -> "" or what went wrong.
    """
    selected = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]

    @lru_cache
    def of(ranks: int) -> dict[str, str]:
        names = [params["case"] for params in selected if params.get("ranks") == ranks]
        results = tmp_path_factory.mktemp("world") / "results.json"
        results.write_text("{}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        lost = "the ranks parted in an earlier case"
        try:
            arguments = (ranks, port, names, results)
            mp.start_processes(zero_worker.main, arguments, nprocs=ranks, start_method="forkserver")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            lost = str(error)
        return dict.fromkeys(names, lost) | json.loads(results.read_text())

    return of


@pytest.mark.parametrize(("ranks", "case"), CASES, ids=[f"{ranks}-ranks-{name}" for ranks, name in CASES])
def test_teacher_under_zero(outcomes, ranks, case):
    if problem := outcomes(ranks)[case]:
        pytest.fail(problem, pytrace=False)
