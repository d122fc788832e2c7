"""A few steps of ``finetune`` in bfloat16 on this machine's device, at each ZeRO stage, against the CPU's.

Losses of a few steps are those of weights that hardly moved, so an engine that never steps passes for right. The
weights tell: how far they end from the CPU's, relative to the way that the CPU's went.

Without a GPU the device is the CPU as well, and one stage is enough: the others have tests of their own.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tracer.models.weights import read_weights
from tracer.train.config import Config
from tracer.train.log import read_log
from tracer.train.run import finetune

STAGES = {0: "amp_bf16", 1: "bf16", 2: "bf16", 3: "bf16"} if torch.cuda.is_available() else {2: "bf16"}


def run_on_the_cpu(config: Config) -> None:
    """Run the same command where no GPU is visible: in this process if it sees none."""
    if not torch.cuda.is_available():
        finetune(config)
        return
    settings = config.output.with_suffix(".yaml")
    settings.write_text(config.to_yaml())
    done = subprocess.run(
        [sys.executable, "-m", "tracer", "finetune", "--config", str(settings)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def strayed(got: Path, want: Path, start: Path) -> float:
    """Return how far weights ended from where they should have, relative to the way from the start: idle, 1."""
    a, b, c = (read_weights(path) for path in (got, want, start))
    names = [name for name, x in c.items() if x.is_floating_point() and name != "logit_scale"]
    assert len(names) > 20

    def distance(x, y):
        return sum(float((x[name].double() - y[name].double()).square().sum()) for name in names) ** 0.5

    return distance(a, b) / distance(c, b)


@pytest.mark.parametrize(("stage", "precision"), STAGES.items())
def test_losses_and_weights_are_those_of_the_cpu_in_float32(config, stage, precision, tmp_path):
    config = dataclasses.replace(config, steps=3, lr=1e-3, eval_data={})
    alone = dataclasses.replace(config, output=tmp_path / "cpu", zero_stage=0)
    run_on_the_cpu(alone)
    want = [row["loss"] for row in read_log(alone.output)]
    run = finetune(dataclasses.replace(config, zero_stage=stage, precision=precision))
    got = [row["loss"] for row in read_log(run)]
    assert len(got) == 3
    assert got == pytest.approx(want, rel=0.03)
    assert got != want  # it was another precision
    start, right = Path(config.pretrained), alone.output / "student.safetensors"
    assert strayed(start, right, start) == 1
    assert strayed(run / "student.safetensors", right, start) < 0.5
