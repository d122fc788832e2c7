"""SIGTERM and Ctrl-C: the last whole step is saved, and the same command goes on from there."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
from safetensors.torch import load_file

from tracer.cli import main
from tracer.data.decoded import DecodedPictures
from tracer.demo import pretrain
from tracer.files import aside
from tracer.losses import TracerLoss
from tracer.train.checkpoint import newest
from tracer.train.log import read_log
from tracer.train.run import finetune


def signal_at(monkeypatch, call: int, number: int) -> None:
    """Send this process a signal in the midst of a step: at a call (0, 1, …) of the loss."""
    forward, count = TracerLoss.forward, iter(range(10**6))

    def interrupted(*args, **kwargs):
        if next(count) == call:
            os.kill(os.getpid(), number)
        return forward(*args, **kwargs)

    monkeypatch.setattr(TracerLoss, "forward", interrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_signal_saves_the_last_step_and_ends_with_its_code(
    capsys, config, tmp_path, monkeypatch, number, code, accumulation
):
    config = dataclasses.replace(config, accumulation=accumulation, eval_data={}, steps=4)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    (tmp_path / "settings.yaml").write_text(config.to_yaml())
    with monkeypatch.context() as patch:
        signal_at(patch, 1 * accumulation, number)
        assert main(["finetune", "--config", str(tmp_path / "settings.yaml")]) == code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == "tracer: stopped after step 1 of 4, which is saved; the same command goes on from there"
    assert newest(aside(config.output)).name == "checkpoint-1"  # the step is given up, not waited for
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    resumed = load_file(finetune(config) / "student.safetensors")
    whole = load_file(finetune(dataclasses.replace(config, output=tmp_path / "w")) / "student.safetensors")
    assert all((value == whole[name]).all() for name, value in resumed.items())


def signal_in_evaluation(monkeypatch, batch: int, number: int) -> list[int]:
    """Send this process a signal in a batch (0, 1, …) of pictures that are evaluated; returns all that begin."""
    whole, begun = DecodedPictures.batches, []

    def interrupted(*args, **kwargs):
        for images, rows in whole(*args, **kwargs):
            begun.append(len(begun))
            if begun[-1] == batch:
                os.kill(os.getpid(), number)
            yield images, rows

    monkeypatch.setattr(DecodedPictures, "batches", interrupted)
    return begun


def without_seconds(run) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "step_seconds"} for row in read_log(run)]


@pytest.mark.parametrize(("step", "steps"), [(2, 4), (4, 4)], ids=["in the midst", "after the last step"])
def test_an_evaluation_that_a_signal_meets_is_left_off_and_done_by_the_next_attempt(
    capsys, config, tmp_path, monkeypatch, step, steps
):
    """Regression: it was completed first, however long it took."""
    monkeypatch.setattr(
        "tracer.evaluation.zero_shot.PICTURES_AT_ONCE", 4
    )  # the set has 4 batches, for two models
    how = {"steps": steps, "eval_every": 2, "keep_best": "test", "log_to": ["tensorboard", "csv"]}
    config = dataclasses.replace(config, **how)
    (tmp_path / "settings.yaml").write_text(config.to_yaml())
    first = 8 * (step // 2 - 1) + 1
    with monkeypatch.context() as patch:
        begun = signal_in_evaluation(patch, first, signal.SIGTERM)
        assert main(["finetune", "--config", str(tmp_path / "settings.yaml")]) == 0
    assert len(begun) == first + 1
    assert f"tracer: stopped after step {step} of {steps}, which is saved" in capsys.readouterr().err
    assert newest(aside(config.output)).name == f"checkpoint-{step}"
    run, whole = finetune(config), finetune(dataclasses.replace(config, output=tmp_path / "whole"))
    assert without_seconds(run) == without_seconds(whole)
    for name in ("student", "teacher", "best"):
        assert (run / f"{name}.safetensors").read_bytes() == (whole / f"{name}.safetensors").read_bytes()


def test_a_signal_after_the_last_step_finds_all_saved(capsys, config, tmp_path, monkeypatch):
    """Regression: the scores at the end ended with 143, as if nothing had been saved."""
    (tmp_path / "settings.yaml").write_text(config.to_yaml())
    with monkeypatch.context() as patch:
        signal_in_evaluation(patch, 0, signal.SIGTERM)
        assert main(["finetune", "--config", str(tmp_path / "settings.yaml")]) == 0
    assert "tracer: stopped after step 6 of 6, which is saved; the same command" in capsys.readouterr().err
    assert newest(aside(config.output)).name == "checkpoint-6"
    assert (finetune(config) / "metrics.json").is_file()


def test_outside_of_the_training_sigterm_ends_the_command_at_once(capsys, config, tmp_path, monkeypatch):
    (tmp_path / "settings.yaml").write_text(config.to_yaml())
    monkeypatch.setattr("tracer.train.run.load_clip", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["finetune", "--config", str(tmp_path / "settings.yaml")]) == 143
    assert "tracer: stopped by SIGTERM; the same command goes on" in capsys.readouterr().err
    assert not aside(config.output).exists()


def test_pretraining_is_saved_too(tmp_path, monkeypatch):
    from demo.test_pretrain import tiny_corpus

    from tracer.demo.config import PretrainConfig
    from tracer.errors import Stopped

    real, calls = pretrain.contrastive_loss, []

    def third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(pretrain, "contrastive_loss", third)
    config = PretrainConfig(output=tmp_path / "run", minutes=5.0, batch_size=16, precision="fp32")
    with pytest.raises(Stopped, match="stopped after step 3, which is saved"):
        pretrain.fit(config, tiny_corpus())
    assert (config.output / "resume.pt").is_file()
