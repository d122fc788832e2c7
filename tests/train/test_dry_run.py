"""A dry run counts what real ranks allocate and send."""

from __future__ import annotations

import json
from pathlib import Path

import dry_ranks
import pytest

from tracer.errors import UserError
from tracer.train.config import Config
from tracer.train.dry_run import dry_run, loss_memory

SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 1000, "width": 64, "heads": 2, "layers": 2},
}


def config(folder: Path, **settings) -> Config:
    (folder / "small.json").write_text(json.dumps(SMALL))
    # DeepSpeed's buckets of 500 million elements would hide all else.
    small = {"zero_optimization": {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}}
    (folder / "deepspeed.json").write_text(json.dumps(small))
    given = {
        "batch_size": 48,
        "precision": "fp32",
        "steps": 10,
        "deepspeed": folder / "deepspeed.json",
    } | settings
    return Config(train_data=folder, model=str(folder / "small.json"), pretrained=None, **given)


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 2, "micro_batch": 8},
        {"zero_stage": 1, "precision": "bf16", "grad_checkpointing": True},
        {"zero_stage": 3, "method": "flyp"},
    ],
    ids=str,
)
def test_a_dry_run_counts_what_two_real_ranks_allocate_and_send(settings, tmp_path):
    run = config(tmp_path, **settings)
    real = dry_ranks.count(run, 2, tmp_path / "results.json")
    dry = dry_run(run, 2, impl="blocked")
    assert sum(dry.at_rest.values()) == pytest.approx(real["rest"], rel=0.05)
    over = real["peak"] - real["rest"]
    assert sum(dry.at_peak.values()) - sum(dry.at_rest.values()) == pytest.approx(over, rel=0.05)
    assert [[name, list(group), list(sent)] for (name, group), sent in dry.sent.items()] == real["sent"]
