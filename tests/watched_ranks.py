"""Ranks that add up numbers under a watch until something ends them: real processes, sockets and signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
import torch
import torch.distributed as dist

from tracer.errors import Stopped, UserError
from tracer.train.ranks import Ranks
from tracer.train.stop import StopHere, StopRequest, stop_requests

STEPS = 10**6


def rank_main(rank: int, size: int, port: int, folder: Path, heartbeat: float, fault: str) -> None:
    """Work as a rank that writes its step to ``folder``; ``fault`` says what befalls rank 1 in step 5."""
    torch.set_num_threads(1)
    with (folder / f"{rank}.err").open("w") as err:
        os.dup2(err.fileno(), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    store = dist.PrefixStore("test", dist.distributed_c10d._get_default_store())
    here = Ranks(rank, size, rank, store)
    code, last = 0, 0
    try:
        with here.watched(heartbeat), stop_requests(True, rank, size) as request:
            here.watch.request = request
            for step in range(1, STEPS):
                here.watch.at(step, "loads its pictures")
                if rank == 1 and step == 5:
                    befall(fault)
                if fault == "refused by all" and step == 5:
                    time.sleep(0 if rank == 1 else 2)
                    raise UserError("--lr is too large")
                here.watch.at(step, "computes")
                for part in range(3):
                    pass_point(request)
                    if part == rank % 3:
                        time.sleep(0.02)
                dist.all_reduce(torch.ones(1))
                last = step
                (folder / f"{rank}.step").write_text(str(step))
    except Stopped as stopped:
        code = stopped.code
    except Exception:
        code = 3
    (folder / f"{rank}.end").write_text(json.dumps({"step": last, "code": code}))
    os._exit(code)


def pass_point(request: StopRequest) -> None:
    try:
        request.point()
    except StopHere:
        raise Stopped("stopped", request.signal or 0, saved=True) from None


def befall(fault: str) -> None:
    """Let something happen to this rank."""
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "fails":
        raise MemoryError("no memory for a batch\nand more lines")
    if fault == "slow":
        time.sleep(4)


def start(size: int, folder: Path, heartbeat: float, fault: str = "") -> list[BaseProcess]:
    """Start the ranks; ``folder`` gets what they say."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = forked.context()
    ranks = [
        context.Process(target=rank_main, args=(rank, size, port, folder, heartbeat, fault))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    return ranks  # type: ignore[return-value]
