"""A dry run counts what real ranks allocate and send, and says so without data, weights, launcher or GPU."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import dry_ranks
import memeff.distributed_clip_loss as ring
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

import tracer.demo.small_clip  # noqa: F401 (registers the model tracer-demo)
from tracer.cli import main
from tracer.errors import Stopped
from tracer.train.accounts import Accounts
from tracer.train.config import Config
from tracer.train.dry_report import memeff, received
from tracer.train.dry_run import dry_run, loss_memory
from tracer.train.fake import fake_ranks, number_of

SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 1000, "width": 64, "heads": 2, "layers": 2},
}
GB, K = 1e9, 1024


def config(folder: Path, **settings) -> Config:
    (folder / "small.json").write_text(json.dumps(SMALL))
    # DeepSpeed's buckets of 500 million elements would hide all else.
    small = {"zero_optimization": {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}}
    (folder / "deepspeed.json").write_text(json.dumps(small))
    given = {"batch_size": 48, "precision": "fp32", "steps": 10, "deepspeed": folder / "deepspeed.json"}
    model = folder / "small.json"
    return Config(train_data=folder, model=str(model), pretrained=None, **given | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 2, "micro_batch": 8},
        {"zero_stage": 1, "precision": "bf16", "grad_checkpointing": True},
        {"zero_stage": 0},
        {"zero_stage": 3},
    ],
    ids=["cached gradients", "recomputed activations", "stage 0", "stage 3"],
)
def test_a_dry_run_counts_what_two_real_ranks_allocate_and_send(settings, tmp_path):
    run = config(tmp_path, **settings)
    real = dry_ranks.count(run, 2, tmp_path / "results.json")
    dry = dry_run(run, 2, impl="blocked")
    assert sum(dry.at_rest.values()) == pytest.approx(real["rest"], rel=0.01)
    assert sum(dry.at_peak.values()) == pytest.approx(real["peak"], rel=0.05)
    assert [[name, list(group), list(sent)] for (name, group), sent in dry.sent.items()] == real["sent"]


def test_a_model_with_weights_of_its_own_is_counted_without_them(tmp_path):
    counts = dry_run(Config(train_data=tmp_path, model="tracer-demo", batch_size=64, precision="fp32"), 8)
    assert counts.at_rest["parameters"] >= 4 * counts.parameters


def test_parts_of_the_memory_of_a_thousand_ranks(tmp_path):
    many = dry_run(config(tmp_path, batch_size=8 * 1024, zero_stage=2), 1024)
    assert many.at_rest["parameters"] == pytest.approx(4 * many.parameters, rel=0.01)  # whole on each rank
    moments = 3 * 4 * many.parameters / 1024  # a master and two moments of a share, padded
    assert moments <= many.at_rest["optimizer"] <= 1.5 * moments
    # The mesh has 128 rows, each of the eight ranks of a host.
    assert {group for _, group in many.sent} == {(8, 8), (128, 127 * 8 + 1), (1024, 1024)}


@pytest.mark.parametrize(
    ("pairs", "ranks", "mesh", "published"),
    [(256 * K, 8, None, 1.45 * GB), (1024 * K, 32, "ring", 1.44 * GB), (12288 * K, 32, "ring", 19.6 * GB)],
)
def test_the_loss_takes_less_memory_than_inf_cl(pairs, ranks, mesh, published):
    # Inf-CL's paper (arXiv 2410.17243), ViT-L/14, whose features have 768 dimensions.
    assert 0.4 * published < loss_memory(pairs, ranks, 768, mesh) < published


@pytest.mark.parametrize("ranks", [8, 64])
def test_memeff_holds_and_receives_what_the_formula_says(ranks, monkeypatch):
    class NotStarted:
        def __getitem__(self, grid):
            return lambda *_, **__: None

    for kernel in ("clip_denom_kernel", "clip_grad_both_kernel"):
        monkeypatch.setattr(ring, kernel, NotStarted())
    monkeypatch.setattr(ring, "_validate_features", lambda *_: None)  # wants a GPU
    monkeypatch.setattr(ring, "_backward_blocks", lambda _: (64, 64, 4, 2))
    pairs, width, accounts = 64 * K, 256, Accounts({"aten::_local_scalar_dense": number_of})
    with fake_ranks(ranks, 8), FakeTensorMode(allow_non_fake_inputs=True), accounts:
        image, text = (
            torch.empty(pairs // ranks, width, dtype=torch.bfloat16).requires_grad_() for _ in range(2)
        )
        own = sum(accounts.held.values())
        loss = ring.DistributedMemoryEfficientCLIPLoss(normalized_inputs=True, group=dist.group.WORLD)
        loss(image, text).backward()
    held, got = memeff(pairs, ranks, width, itemsize=2)
    assert sum(accounts.at_peak.values()) - own == pytest.approx(held, rel=0.01)
    counted = sum(
        received(name, group.ranks, sent.bytes)
        for (name, group), sent in accounts.sent.items()
        if name != "send"
    )
    assert counted == pytest.approx(got, rel=0.01)


def test_the_command_prints_a_table_and_writes_nothing(tmp_path, monkeypatch, capsys):
    run = config(tmp_path, zero_stage=2, micro_batch=8, dry_run=16)
    file = tmp_path / "run.yaml"
    file.write_text(run.to_yaml())
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", "--config", str(file)]) == 0
    said = capsys.readouterr().out
    assert "dry run of rank 0 of 16, 8 on a host" in said
    for word in ("parameters", "optimizer", "averages, teacher", "loss", "memeff", "model, not measured"):
        assert word in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("stop", "code"),
    [(KeyboardInterrupt, 130), (partial(Stopped, "as SIGTERM has it", signal.SIGTERM), 143)],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_dry_run_that_is_stopped_says_so(tmp_path, monkeypatch, capsys, stop, code):
    """Regression: it spoke of checkpoints."""

    def stopped(*_: object) -> None:
        raise stop()

    monkeypatch.setattr("tracer.train.dry_run.dry_run", stopped)
    file = tmp_path / "run.yaml"
    file.write_text(config(tmp_path, dry_run=1024).to_yaml())
    assert main(["finetune", "--config", str(file)]) == code
    said = capsys.readouterr()
    assert said.out.startswith("dry run of ")
    assert "on 1,024 ranks: counting one step of one of them; a large model takes minutes" in said.out
    assert said.err == "tracer: the dry run was stopped before it had counts; it leaves nothing behind\n"


def test_a_dry_run_under_a_launcher_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    file = tmp_path / "run.yaml"
    file.write_text(config(tmp_path, dry_run=16).to_yaml())
    assert main(["finetune", "--config", str(file)]) == 2
    assert "start it without a launcher" in capsys.readouterr().err
