"""The teacher under DeepSpeed ZeRO 0 to 3, on 1, 2 and 4 ranks (gloo): see zero_cases.py for the cases.

Starting processes and DeepSpeed is what costs here, so each world of ranks is started once and runs all of the
cases that are selected.
"""

from __future__ import annotations

import json
import multiprocessing
import socket

import pytest
import torch.multiprocessing as mp
import zero_cases
import zero_worker

# DeepSpeed is imported once, in a server that the ranks are forked from, instead of seven times.
multiprocessing.set_forkserver_preload(["zero_worker"])

CASES = [(ranks, name) for ranks in (1, 2, 4) for name in zero_cases.cases(ranks)]


@pytest.fixture(scope="module")
def world(request, tmp_path_factory) -> dict[str, str]:
    """Start ``request.param`` ranks and return, for each selected case that they ran, "" or what went wrong."""
    ranks = request.param
    selected = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    names = [params["case"] for params in selected if params.get("world") == ranks]
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


@pytest.mark.parametrize(
    ("world", "case"), CASES, indirect=["world"], ids=[f"{ranks}-ranks-{name}" for ranks, name in CASES]
)
def test_teacher_under_zero(world, case):
    if problem := world[case]:
        pytest.fail(problem, pytrace=False)
