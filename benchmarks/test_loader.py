"""An epoch of JPEGs with each loader, for ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

import os

import pytest

from benchmarks import loader, pictures


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    files = pictures.photographs(tmp_path_factory.mktemp("pictures"), 32)
    return pictures.Source("500×375 JPEG → 224×224", files, 224, 32, 4)


@pytest.mark.parametrize("name", [loader.OURS, loader.PIL, loader.TORCHVISION, loader.CUBIC, loader.LINEAR])
def test_epoch(benchmark, source, name):
    entrant = loader.entrants(source, len(os.sched_getaffinity(0)))[name]
    count = source.batch * source.batches
    benchmark.pedantic(lambda: loader.run_through(entrant.epoch, count), rounds=3, warmup_rounds=1)
    benchmark.extra_info["pictures"] = count
