"""The demo's runs: it continues its own, and leaves those of another process alone."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from cut_runs import content, cut

from tracer.demo.runs import run_once
from tracer.errors import UserError
from tracer.files import aside, claim_folder, whole_folder
from tracer.models.clip import load_clip
from tracer.models.weights import save_weights
from tracer.train.checkpoint import WHOLE
from tracer.train.config import Config


@pytest.fixture
def run(tiny_config, drawings, tmp_path) -> Config:
    """Five steps of a one-layer model by FLYP, in the folder that the demo gives them."""
    torch.manual_seed(0)
    start = tmp_path / "start.safetensors"
    save_weights(load_clip(str(tiny_config), None).model.state_dict(), start)
    return Config(
        train_data=drawings / "train.csv",
        model=str(tiny_config),
        pretrained=str(start),
        output=tmp_path / "demo" / "flyp-seed-1",
        cache=tmp_path / "cache",
        method="flyp",
        steps=5,
        save_every=2,
        batch_size=12,
        warmup=2,
        lr=1e-2,
        precision="fp32",
    )


def test_the_demo_goes_on_with_its_own_run_and_trains_another_anew(run, monkeypatch, capsys):
    def says(cut_off: Config) -> str:
        part = cut(cut_off, monkeypatch, 3)
        assert any(part.glob(WHOLE))
        shutil.rmtree(run_once(run))
        return capsys.readouterr().out

    assert "going on after step 2 of 5" in says(run)
    assert "going on" not in says(dataclasses.replace(run, lr=2e-2))


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_demo_leaves_what_another_process_is_writing(run, monkeypatch, finished, checkpoint):
    """With other settings, and with the same ones as long as there is no checkpoint."""
    part = aside(run.output)
    if checkpoint:
        cut(dataclasses.replace(run, lr=2e-2), monkeypatch, 3)
    if finished:
        claim_folder(run.output)
        (run.output / "run.json").write_text("of an earlier run")
    with whole_folder(run.output, keep=WHOLE):
        (part / "log.jsonl").write_text("of the first process")
        before = content(part)
        with pytest.raises(UserError, match=f"another process is writing '{part}': wait until it has ended"):
            run_once(run)
        assert content(part) == before
        shutil.rmtree(run.output, ignore_errors=True)
