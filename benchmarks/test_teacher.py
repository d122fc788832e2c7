"""``pytest benchmarks --benchmark-only``: one update of ViT-B/32's averages, each way."""

from __future__ import annotations

import pytest
import torch

from benchmarks import teacher

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", params=teacher.MODES)
def updates(request):
    low = request.param != "fp32"
    model = teacher.build(
        "ViT-B-32", DEVICE, torch.bfloat16 if request.param.startswith("bf16") else torch.float32
    )
    return teacher.competitors(model, low=low)


@pytest.mark.parametrize("update", [teacher.OURS, teacher.LOOP])
def test_update(benchmark, updates, update):
    call, _ = updates[update]
    call()  # builds what later calls keep
    with teacher.counting() as counter:
        call()

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    benchmark.extra_info |= {"launches": counter.launches, "bytes": counter.bytes}


def test_published_loop(benchmark):
    model = teacher.build("ViT-B-32", DEVICE, torch.float32)
    call, _ = teacher.competitors(model, low=False)[teacher.PUBLISHED]

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
