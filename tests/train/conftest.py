"""The settings of a small run, which the tests of training change as they need."""

from __future__ import annotations

import pytest
import torch

from tracer.models.clip import load_clip
from tracer.models.weights import save_weights
from tracer.train.config import Config


@pytest.fixture
def config(tiny_config, drawings, tmp_path) -> Config:
    """Six steps of a one-layer model on the drawn pictures, starting from saved random weights."""
    torch.manual_seed(0)
    start = tmp_path / "start.safetensors"
    save_weights(load_clip(str(tiny_config), None).model.state_dict(), start)
    return Config(
        train_data=drawings / "train.csv",
        eval_data={"test": drawings / "test.csv"},
        model=str(tiny_config),
        pretrained=str(start),
        output=tmp_path / "run",
        cache=tmp_path / "cache",
        steps=6,
        batch_size=16,
        warmup=2,
        lr=1e-2,
        precision="fp32",
    )
