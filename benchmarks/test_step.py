"""Every kind of training step of the demo's model, for ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

import pytest
import torch

from benchmarks.step_trainer import STEPS, Case, Trainer, problem
from tracer.machine import resolve_precision


@pytest.fixture(scope="module")
def trainer():
    trainer = Trainer(problem(Case("tracer-demo", 64)), resolve_precision("auto"))
    trainer.check("tracer-demo")
    return trainer


@pytest.mark.parametrize("kind", STEPS)
def test_step(benchmark, trainer, kind):
    phases = trainer.phases(kind)

    def run() -> None:
        for phase in phases.values():
            phase()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    benchmark.extra_info["pairs"] = len(trainer.text)
