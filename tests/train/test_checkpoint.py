"""Runs that are cut off go on from their last checkpoint and end, bit for bit, as if they had not been."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from cut_runs import content, cut, kill
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tracer.errors import UserError
from tracer.files import MARK, aside, claim_folder, file_aside, whole_folder
from tracer.models.clip import load_clip
from tracer.models.weights import save_weights
from tracer.train.checkpoint import WHOLE, newest
from tracer.train.config import Config
from tracer.train.log import read_log
from tracer.train.run import finetune


@pytest.fixture(scope="module")
def start(tiny_config, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    save_weights(load_clip(str(tiny_config), None).model.state_dict(), path)
    return path


@pytest.fixture
def config(tiny_config, drawings, start, tmp_path) -> Config:
    """Five steps of a one-layer model on the drawn pictures, a checkpoint after every other."""
    return Config(
        train_data=drawings / "train.csv",
        model=str(tiny_config),
        pretrained=str(start),
        output=tmp_path / "run",
        cache=tmp_path / "cache",
        steps=5,
        save_every=2,
        batch_size=12,  # 32 pictures: batches straddle the epochs
        warmup=2,
        lr=1e-2,
        precision="fp32",
        adapter_momentum=0.5,
    )


def interrupt(*_args, **_kwargs):
    raise KeyboardInterrupt


def uninterrupted(config: Config, tmp_path: Path) -> Path:
    """The same run in one go, and without checkpoints on the way."""
    return finetune(dataclasses.replace(config, output=tmp_path / "whole", save_every=500))


def assert_same(run: Path, whole: Path) -> None:
    names = {p.name for p in whole.iterdir()}
    assert {p.name for p in run.iterdir()} == names
    for name in names - {"run.json", "log.jsonl", "tensorboard", "config.yaml"}:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    rows, expected = read_log(run), read_log(whole)
    for row in (*rows, *expected):
        del row["step_seconds"]
    assert rows == expected
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    about, other = (json.loads((path / "run.json").read_text()) for path in (run, whole))
    assert about["fingerprint"] == other["fingerprint"]
    sizes, others = about["sizes"], other["sizes"]
    assert sizes.pop("checkpoint_bytes") == pytest.approx(others.pop("checkpoint_bytes"), abs=100)
    assert sizes == others


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "flyp"},
        {"teacher": "wma", "zero_stage": 0},
        {"teacher": "wma", "zero_stage": 1},
        {"teacher": "ema", "teacher_every": 2, "zero_stage": 2},
        {"teacher": "uniform", "zero_stage": 3, "projection_product": 0.0},
        {"precision": "bf16"},
        {"precision": "amp_bf16", "zero_stage": 2, "accumulation": 3},
        {"method": "flyp", "zero_stage": 0, "accumulation": 2},
        {"method": "r-adapter"},
        {"method": "r-adapter", "micro_batch": 5, "accumulation": 2, "adapter_drop": 0.5},
        {"micro_batch": 5, "zero_stage": 2},
        {"method": "r-adapter", "adapter_rank": 4, "zero_stage": 0, "precision": "amp_bf16"},
        {"method": "r-adapter", "adapter_momentum": 0.0, "precision": "bf16", "accumulation": 2},
        {"method": "tracer", "adapters": True, "zero_stage": 2},
        {"method": "tracer", "adapters": True, "zero_stage": 3},
    ],
    ids=lambda changes: " ".join(str(value) for value in changes.values()),
)
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(config, tmp_path, monkeypatch, capsys, changes):
    config = dataclasses.replace(config, **changes)
    # In the midst of step 4; with accumulation, between two of its micro-steps.
    part = cut(config, monkeypatch, 3 * config.accumulation + config.accumulation - 1)
    assert [p.name for p in part.glob("checkpoint*")] == ["checkpoint-2"]
    torch.rand(17)  # the random generators are at another place than they were
    run = finetune(config)
    assert f"'{part}': going on after step 2 of 5\n" in capsys.readouterr().out
    assert_same(run, uninterrupted(config, tmp_path))


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_the_loss_scale_goes_on_too(config, tmp_path, monkeypatch, capsys, zero_stage):
    """In fp16: an overflow before the checkpoint lowers the scale, and three good steps raise it."""
    scaling = {"initial_scale_power": 13, "hysteresis": 1, "loss_scale_window": 2}
    (tmp_path / "deepspeed.json").write_text(json.dumps({"fp16": scaling}))
    changes = {"precision": "fp16", "zero_stage": zero_stage, "deepspeed": tmp_path / "deepspeed.json"}
    config = dataclasses.replace(config, **changes, steps=8, save_every=4)
    cut(config, monkeypatch, 6)
    run = finetune(config)
    assert "going on after step 4 of 8" in capsys.readouterr().out
    assert_same(run, uninterrupted(config, tmp_path))
    scales = [row["loss_scale"] for row in read_log(run)]
    assert len(set(scales)) > 2  # it falls, and rises again
    assert max(scales[4:]) > min(scales)


def test_another_number_of_ranks_is_refused(config, monkeypatch):
    part = cut(config, monkeypatch, 3)
    about = part / "checkpoint-2/checkpoint.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"ranks": 2}))
    with pytest.raises(
        UserError, match=f"'{part}' holds an unfinished run of 2 ranks, and this one has 1: start"
    ):
        finetune(config)


def test_a_run_that_was_cut_off_twice(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, method="r-adapter", save_every=1)
    cut(config, monkeypatch, 2)
    part = cut(config, monkeypatch, 1)
    assert newest(part).name == "checkpoint-3"
    assert_same(finetune(config), uninterrupted(config, tmp_path))


def test_a_process_that_was_killed(config, tmp_path):
    config = dataclasses.replace(config, steps=40, save_every=3, eval_data={"test": config.train_data})
    kill(config, tmp_path / "settings.yaml")
    time.sleep(1)  # TensorBoard orders its files by the second
    folder = finetune(config)
    assert_same(folder, uninterrupted(config, tmp_path))
    board, rows = EventAccumulator(str(folder / "tensorboard")).Reload(), read_log(folder)
    assert len(list((folder / "tensorboard").iterdir())) == 2
    assert [event.step for event in board.Scalars("loss")] == [row["step"] for row in rows]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])


def test_nothing_half_written_is_taken_for_whole(config, tmp_path, monkeypatch):
    """Killed while a checkpoint is written, or when the one before it is half removed."""
    part = cut(config, monkeypatch, 3)
    shutil.copytree(part / "checkpoint-2", part / "checkpoint-3.part")
    (part / "checkpoint-3.part" / "rank-0.pt").write_bytes(b"half")
    claim_folder(part / "checkpoint-1")
    file_aside(part / "student.safetensors").write_bytes(b"half")
    cut(config, monkeypatch, 0)
    assert [p.name for p in part.glob("checkpoint*")] == ["checkpoint-2"]
    assert_same(finetune(config), uninterrupted(config, tmp_path))


@pytest.mark.parametrize("place", ["sync", "torch.save"])
def test_an_interrupted_save_leaves_the_checkpoint_before_it(config, tmp_path, monkeypatch, place):
    cut(config, monkeypatch, 3)

    with monkeypatch.context() as patch:
        patch.setattr(f"tracer.train.checkpoint.{place}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    assert [p.name for p in aside(config.output).glob("checkpoint*")] == ["checkpoint-2"]
    assert_same(finetune(config), uninterrupted(config, tmp_path))


def test_a_full_disk_is_named_and_costs_nothing_but_the_steps_since(config, tmp_path, monkeypatch):
    part = cut(config, monkeypatch, 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint-4' could not be written: free some space there"):
            finetune(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in part.glob("checkpoint*")] == ["checkpoint-2"]
    assert_same(finetune(config), uninterrupted(config, tmp_path))


def test_after_the_last_step_nothing_is_trained_again(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("tracer.train.run.save_weights", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    assert newest(aside(config.output)).name == "checkpoint-5"
    with monkeypatch.context() as patch:
        patch.setattr("tracer.train.loop.TracerLoss.forward", None)
        run = finetune(config)
    assert_same(run, uninterrupted(config, tmp_path))


def test_a_run_without_a_checkpoint_begins_anew(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, save_every=500)
    assert not cut(config, monkeypatch, 2).exists()
    part = aside(config.output)
    claim_folder(part)  # as a kill leaves it
    (part / "tensorboard").mkdir()
    (part / "log.jsonl").write_text('{"step": 1, "loss": 9')
    assert_same(finetune(config), uninterrupted(config, tmp_path))


def test_an_unfinished_run_with_other_settings_is_refused_and_stays(config, monkeypatch, drawings, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(drawings, data)
    config = dataclasses.replace(config, train_data=data / "train.csv")
    part = cut(config, monkeypatch, 3)
    before = content(part)
    for changes, names in (
        ({"lr": 2e-2, "seed": 3}, "--lr, --seed"),
        ({"steps": 50}, "--steps"),
        ({"method": "flyp"}, "--method"),
        ({"precision": "bf16"}, "--precision"),
    ):
        with pytest.raises(
            UserError, match=f"'{part}' holds an unfinished run with other {names}: give"
        ) as e:
            finetune(dataclasses.replace(config, **changes))
        assert "choose another --output, or remove that folder" in str(e.value)
    (data / "circle-00.png").write_bytes((data / "square-01.png").read_bytes())
    with pytest.raises(UserError, match="holds an unfinished run with other data or versions: give"):
        finetune(config)
    assert content(part) == before


def test_two_processes_do_not_write_the_same_run(config, monkeypatch):
    """With a checkpoint and before the first one; the lock ends with its holder."""
    with whole_folder(config.output, keep=WHOLE) as part:
        (part / "log.jsonl").write_text("of the first process")
        with pytest.raises(UserError, match=f"another process is writing '{part}': wait until it has ended"):
            finetune(config)
        assert {p.name for p in part.iterdir()} == {MARK, "log.jsonl"}
    shutil.rmtree(config.output)
    part = cut(config, monkeypatch, 3)
    before = content(part)
    with (
        whole_folder(config.output, keep=WHOLE),
        pytest.raises(UserError, match="another process is writing"),
    ):
        finetune(config)
    config.output.rename(part)
    assert content(part) == before
    assert finetune(config).exists()


def test_what_does_not_decide_the_result_may_change(config, tmp_path, monkeypatch):
    cut(config, monkeypatch, 3)
    changes = {"save_every": 3, "workers": 1, "cache": tmp_path / "elsewhere", "max_bad": 0.5}
    assert_same(finetune(dataclasses.replace(config, **changes)), uninterrupted(config, tmp_path))


@pytest.mark.parametrize("damage", ["cut", "turned", "gone"])
def test_a_damaged_checkpoint_is_named_and_stays(config, monkeypatch, damage):
    config = dataclasses.replace(config, method="r-adapter")
    part = cut(config, monkeypatch, 3)
    files = [p for p in (part / "checkpoint-2").rglob("*") if p.is_file() and p.name != MARK]
    assert len(files) == 4
    for path in files:
        whole = path.read_bytes()
        if damage == "gone":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(whole[: len(whole) // 2])
        else:
            middle = len(whole) // 2
            path.write_bytes(
                whole[:middle] + bytes(255 - b for b in whole[middle : middle + 64]) + whole[middle + 64 :]
            )
        with pytest.raises(
            UserError, match=rf"checkpoint '{part}/checkpoint-2' cannot be read \(.*: remove '{part}'"
        ):
            finetune(config)
        path.write_bytes(whole)
    assert finetune(config).exists()


def test_a_log_that_lost_rows_is_named(config, monkeypatch):
    part = cut(config, monkeypatch, 3)
    log = part / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:1]))
    with pytest.raises(
        UserError, match="has lost rows: 1 of the 2 until the last checkpoint are there; remove"
    ):
        finetune(config)


def test_a_checkpoint_holds_only_what_trains(config, tmp_path, monkeypatch):
    sizes = {}
    for method in ("flyp", "r-adapter"):
        run = dataclasses.replace(config, method=method, output=tmp_path / method)
        part = cut(run, monkeypatch, 3)
        state = torch.load(
            part / "checkpoint-2/engine/mp_rank_00_model_states.pt", weights_only=False, map_location="cpu"
        )
        assert all(".adapter." in key for key in state["module"]) == (method == "r-adapter")
        assert {p.name for p in (part / "checkpoint-2").iterdir()} == {
            MARK,
            "checkpoint.json",
            "engine",
            "rank-0.pt",
        }
        sizes[method] = json.loads((finetune(run) / "run.json").read_text())["sizes"]
    trained = sizes["flyp"]["trained_parameters"]
    assert 16 * trained < sizes["flyp"]["checkpoint_bytes"] < 16.5 * trained  # weights, masters, two moments
    assert sizes["r-adapter"]["checkpoint_bytes"] < sizes["flyp"]["checkpoint_bytes"] / 50


def test_seconds_of_both_attempts_count(config, monkeypatch):
    part = cut(config, monkeypatch, 3)
    about = part / "checkpoint-2/checkpoint.json"
    state = json.loads(about.read_text())
    assert 0 < state["seconds"] < 60
    about.write_text(json.dumps(state | {"seconds": 1000.0}))
    assert 1000 < json.loads((finetune(config) / "run.json").read_text())["seconds"] < 1060
