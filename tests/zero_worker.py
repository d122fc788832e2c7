"""One rank of tests/test_zero.py: it runs the cases of zero_cases.py in one process group, each for itself."""

from __future__ import annotations

import json
import os
import tempfile
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch._dynamo  # these two would be imported by each rank, at its first engine
import torch._inductor.compile_fx
import torch.distributed as dist
from zero_cases import cases

# Otherwise compiled at the first start, for a minute; only inference uses it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# A rank that fails within a case leaves the others waiting in a collective for as long as this.
PATIENCE = timedelta(seconds=90)


def main(rank: int, world_size: int, port: int, names: list[str], results: Path) -> None:
    """Run the cases ``names``; rank 0 keeps ``results`` up to date: JSON, name -> "" or what went wrong.

    A case that fails on every rank fails alone. Ranks that part, where a case fails on some of them only, can
    no longer communicate: the cases after that are not run.
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
    deepspeed.init_distributed("gloo", timeout=PATIENCE, verbose=False)
    # Outcomes travel past the process group, which a failed case may leave in the midst of a collective.
    outcomes = dist.TCPStore("127.0.0.1", port, timeout=2 * PATIENCE, wait_for_workers=False)
    table, result = cases(world_size), {}
    for name in names:
        outcomes.set(f"{name} {rank}", _outcome(table[name]))
        said = [outcomes.get(f"{name} {other}").decode() for other in range(world_size)]
        result[name] = "\n".join(f"rank {r}: {text}" for r, text in enumerate(said) if text)
        if rank == 0:
            results.write_text(json.dumps(result))
        if any(said) and not all(said):
            return
    dist.barrier()
    dist.destroy_process_group()


def _outcome(case) -> str:
    try:
        case()
    except Exception:
        return traceback.format_exc()
    return ""
