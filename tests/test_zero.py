"""The teacher under DeepSpeed ZeRO 0 to 3, on 1, 2 and 4 ranks (gloo): see zero_worker.py for the checks.

Starting processes and DeepSpeed is what costs here, so each process group runs all of its checks.
"""

from __future__ import annotations

import multiprocessing
import socket

import pytest
import torch.multiprocessing as mp
import zero_worker

# DeepSpeed is imported once, in a server that the ranks are forked from, instead of seven times.
multiprocessing.set_forkserver_preload(["zero_worker"])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_teacher_under_zero(ranks, tmp_path):
    """1: against the single process. 2: also resume, accumulation, overflow, dtypes. 4: shards padded unevenly."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (ranks, str(tmp_path), port)
    mp.start_processes(zero_worker.main, arguments, nprocs=ranks, start_method="forkserver")
