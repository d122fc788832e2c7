"""Ranks that add up numbers under a watch until something ends them: real processes, sockets and signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
import torch
import torch.distributed as dist

from tracer.errors import Stopped, UserError
from tracer.train import watch
from tracer.train.ranks import Ranks
from tracer.train.stop import StopHere, StopRequest, stop_requests

STEPS = 10**6


def rank_main(
    rank: int, size: int, port: int, folder: Path, heartbeat: float, fault: str, hosts: bool
) -> None:
    """Work as a rank that writes its step to ``folder``; ``fault`` says what befalls rank 1 in step 5,
    or rank 0 if it begins with "first".

    With ``hosts`` each rank takes itself to be alone on its host.
    """
    torch.set_num_threads(1)
    if hosts:
        os.environ["LOCAL_WORLD_SIZE"] = "1"
        watch._process_space = lambda: str(rank)
    with (folder / f"{rank}.err").open("w") as err:
        os.dup2(err.fileno(), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    store = dist.PrefixStore("test", dist.distributed_c10d._get_default_store())
    here = Ranks(rank, size, 0 if hosts else rank, store)
    code, last, victim = 0, 0, 0 if fault.startswith("first ") else 1
    try:
        with here.watched(heartbeat), stop_requests(True, rank, size) as request:
            here.watch.request = request
            for step in range(1, STEPS):
                here.watch.at(step, "loads its pictures")
                if rank == victim and step == 5:
                    befall(fault.removeprefix("first "))
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
    except KeyboardInterrupt:
        code = 130
    except Exception:
        code = 3
    (folder / f"{rank}.end").write_text(json.dumps({"step": last, "code": code}))
    os._exit(code)


def pass_point(request: StopRequest) -> None:
    try:
        request.point()
    except StopHere:
        raise Stopped("stopped", request.signal or 0, saved=True, together=True) from None


def befall(fault: str) -> None:
    """Let something happen to this rank."""
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "fails":
        raise MemoryError("no memory for a batch\nand more lines")
    if fault == "is asked to stop":
        raise Stopped("stopped by SIGTERM", signal.SIGTERM)
    if fault == "is interrupted":
        raise KeyboardInterrupt
    if fault == "slow":
        time.sleep(4)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Link:
    """The way of a rank to the store of all: it carries bytes both ways until it is cut."""

    def __init__(self, target: int) -> None:
        self._target, self._cut = target, threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []  # until the test ends: a cut link closes nothing
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Carry nothing from now on; as on a network, no side is told."""
        self._cut.set()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = self._reach()
                self._open += near, far
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _reach(self) -> socket.socket:
        for _ in range(600):
            with suppress(ConnectionRefusedError):  # the store is not there yet
                return socket.create_connection(("127.0.0.1", self._target))
            time.sleep(0.1)
        raise TimeoutError("there is no store")

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while (some := source.recv(65536)) and not self._cut.is_set():
                sink.sendall(some)
        if not self._cut.is_set():
            with suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for each in (self._listener, *self._open):
            each.close()


@contextmanager
def cut_link(size: int, folder: Path, heartbeat: float) -> Iterator[tuple[list[BaseProcess], Link]]:
    """Start ranks, each a host of its own, of which the last reaches the store by a link that can be cut."""
    port = free_port()
    link = Link(port)
    try:
        yield start(size, folder, heartbeat, hosts=True, ports=[port] * (size - 1) + [link.port]), link
    finally:
        link.close()


def start(
    size: int,
    folder: Path,
    heartbeat: float,
    fault: str = "",
    hosts: bool = False,
    ports: list[int] | None = None,
) -> list[BaseProcess]:
    """Start the ranks; ``folder`` gets what they say."""
    ports = ports or [free_port()] * size
    context = forked.context()
    ranks = [
        context.Process(target=rank_main, args=(rank, size, ports[rank], folder, heartbeat, fault, hosts))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    return ranks  # type: ignore[return-value]
