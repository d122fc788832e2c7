"""A few steps of ``finetune`` in bfloat16 on this machine's device, at each ZeRO stage, against the CPU's losses.

Without a GPU the device is the CPU as well, and one stage is enough: the others have tests of their own.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

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


@pytest.mark.parametrize(("stage", "precision"), STAGES.items())
def test_losses_are_those_of_the_cpu_in_float32(config, stage, precision, tmp_path):
    config = dataclasses.replace(config, steps=3, lr=1e-3, eval_data={})
    alone = dataclasses.replace(config, output=tmp_path / "cpu", zero_stage=0)
    run_on_the_cpu(alone)
    want = [row["loss"] for row in read_log(alone.output)]
    run = finetune(dataclasses.replace(config, zero_stage=stage, precision=precision))
    got = [row["loss"] for row in read_log(run)]
    assert len(got) == 3
    assert got == pytest.approx(want, rel=0.03)
    assert got != want  # it was another precision
