"""One step of real ranks: what torch's allocator says that they keep, and what their collectives move."""

from __future__ import annotations

import gc
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import forked
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from tracer.data.batches import Batch
from tracer.models.clip import load_clip
from tracer.train.accounts import Accounts
from tracer.train.config import Config
from tracer.train.loop import Trainer
from tracer.train.ranks import join
from tracer.train.run import prepare


def count(config: Config, size: int, results: Path) -> dict[str, Any]:
    """Return what rank 0 of real ranks keeps and sends in the second step of a run on random pictures."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = forked.context()
    ranks = [context.Process(target=rank_main, args=(r, size, port, config, results)) for r in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [0] * size
    return json.loads(results.read_text())


def rank_main(rank: int, size: int, port: int, config: Config, results: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    join(60)
    torch.manual_seed(0)
    accounts = Witness()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocator, accounts:
        clip = load_clip(config.model, None)
        prepare(config, clip.model)
        trainer = Trainer(config, clip.model)
        trainer.distinct = False
        trainer.step(1, [batch(config, rank, size)], measure=False)
        dist.barrier()
        gc.collect()  # whatever of the step before lies in reference cycles
        gc.disable()  # else what was allocated before decides when those of this step go, as in the dry run
        accounts.restart()
        began = time.time_ns()
        trainer.step(2, [batch(config, rank, size)], measure=False)
        ended = time.time_ns()
    if rank == 0:
        rest = peak = total = 0
        for at, change in sorted(allocations(allocator) + accounts.unseen):
            total += change
            if at < began:
                rest = total
            elif at < ended:
                peak = max(peak, total)
        sent = [[name, list(group), list(sent)] for (name, group), sent in accounts.sent.items()]
        results.write_text(json.dumps({"rest": rest, "peak": peak, "sent": sent}))
    dist.barrier()
    dist.destroy_process_group()


class Witness(Accounts):
    """Accounts that note what other threads than the main one give back: the profiler does not hear of it.

    A thread of gloo holds what it sends, and is now and then the last to let go of it.

    Attributes:
        unseen: the moment in ns, and the bytes, negative.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unseen: list[tuple[int, int]] = []

    def _add(self, kind: str, size: int) -> None:
        super()._add(kind, size)
        if threading.get_ident() != threading.main_thread().ident:
            self.unseen.append((time.time_ns(), size))


def batch(config: Config, rank: int, size: int) -> Batch:
    n = config.batch_size // size
    image, text = torch.randn(n, 3, 64, 64), torch.randint(1, 900, (n, 16))
    return Batch(image, text, torch.arange(n) + rank * n, torch.arange(n))


def allocations(allocator: Any) -> list[tuple[int, int]]:
    """Return what the allocator gave and took back: the moment in ns, and the bytes."""
    events = allocator.profiler.kineto_results.events()
    return [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
