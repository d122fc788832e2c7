"""Runs that are cut off go on from their last checkpoint and end, bit for bit, as if they had not been."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from cut_runs import content, cut, kill
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tracer.errors import UserError
from tracer.files import MARK, aside, claim_folder, file_aside, read_tensors, whole_folder
from tracer.models.clip import load_clip
from tracer.models.weights import save_weights
from tracer.train.checkpoint import WHOLE, _sealed, newest, whole_checkpoints
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
        {"teacher": "wma", "zero_stage": 1},
        {"teacher": "ema", "teacher_every": 2, "zero_stage": 2},
        {"teacher": "uniform", "zero_stage": 3, "projection_product": 0.0},
        {"precision": "amp_bf16", "zero_stage": 2, "accumulation": 3},
        {"method": "r-adapter"},
        {"method": "r-adapter", "micro_batch": 5, "accumulation": 2, "adapter_drop": 0.5},
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
    (part / "checkpoint-3.part" / "rank-0.safetensors").write_bytes(b"half")
    claim_folder(part / "checkpoint-1")
    file_aside(part / "student.safetensors").write_bytes(b"half")
    cut(config, monkeypatch, 0)
    assert not (part / "checkpoint-3.part").exists()
    assert newest(part).name == "checkpoint-2"
    assert_same(finetune(config), uninterrupted(config, tmp_path))


@pytest.mark.parametrize("place", ["sync", "write_part"])
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
        with pytest.raises(UserError, match=r"checkpoint-4' could not be written \(File too large\): free"):
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
    """Until the user says so; what is other is named."""
    data = tmp_path / "data"
    shutil.copytree(drawings, data)
    config = dataclasses.replace(config, train_data=data / "train.csv")
    part = cut(config, monkeypatch, 3)
    before = content(part)
    for changes, names in (
        ({"lr": 2e-2, "seed": 3}, "--lr (then 0.01, now 0.02), --seed (then 0, now 3)"),
        ({"steps": 50}, "--steps (then 5, now 50)"),
        ({"method": "flyp"}, "--method (then tracer, now flyp)"),
        ({"precision": "bf16"}, "--precision (then fp32, now bf16)"),
        ({"pretrained": None}, "--pretrained (then a file, now null)"),
    ):
        with pytest.raises(UserError) as e:
            finetune(dataclasses.replace(config, **changes))
        assert str(e.value) == (
            f"'{part}' holds an unfinished run with other {names}: give the same to go on, choose another "
            "--output, or add --restart true to give it up"
        )
    (data / "circle-00.png").write_bytes((data / "square-01.png").read_bytes())
    with pytest.raises(UserError, match=r"an unfinished run with other --train_data \(its content\): give"):
        finetune(config)
    monkeypatch.setattr("tracer.train.identity.versions", lambda: {"torch": "3.0"})
    with pytest.raises(UserError, match=r"torch \(then 2.*, now 3.0\)"):
        finetune(config)
    assert content(part) == before
    run = finetune(dataclasses.replace(config, restart=True))
    assert len(read_log(run)) == 5


def test_an_unfinished_run_without_a_checkpoint_is_not_overwritten_either(config, monkeypatch):
    config = dataclasses.replace(config, save_every=500)
    with monkeypatch.context() as patch:
        patch.setattr("tracer.files.remove_tree", lambda _: None)  # killed: nothing tidies up
        part = cut(config, monkeypatch, 2)
    before = content(part)
    with pytest.raises(UserError, match=r"holds an unfinished run with other --lr \(then 0.01, now 0.02\)"):
        finetune(dataclasses.replace(config, lr=2e-2))
    assert content(part) == before
    assert finetune(config).exists()


def test_another_place_and_other_time_stamps_are_the_same_run(
    config, tmp_path, monkeypatch, drawings, capsys
):
    """Pictures, start and model config are copied elsewhere, as a job is staged, and touched."""
    config = dataclasses.replace(config, eval_data={"test": drawings / "test.csv"})
    cut(config, monkeypatch, 3)
    staged = tmp_path / "staged"
    shutil.copytree(drawings, staged)
    for name in (config.model, config.pretrained):
        shutil.copy(name, staged)
    for file in staged.iterdir():
        os.utime(file, (0, 0))
    places = {
        "train_data": staged / "train.csv",
        "eval_data": {"test": staged / "test.csv"},
        "model": str(staged / Path(config.model).name),
        "pretrained": str(staged / Path(config.pretrained).name),
    }
    monkeypatch.chdir(staged)
    run = finetune(dataclasses.replace(config, **places))
    assert "going on after step 2 of 5" in capsys.readouterr().out
    assert_same(run, uninterrupted(config, tmp_path))


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


def spoil(path: Path, damage: str) -> None:
    whole = path.read_bytes()
    middle = len(whole) // 2
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[:middle])
    else:
        turned = bytes(255 - b for b in whole[middle : middle + 8])
        path.write_bytes(whole[:middle] + turned + whole[middle + 8 :])


DAMAGES = {
    ("rank-0.safetensors", "cut"): r"'rank-0.safetensors' has \d+ bytes instead of \d+",
    ("rank-0.safetensors", "turned"): "the content of 'rank-0.safetensors' has been changed",
    ("rank-0.safetensors", "gone"): "'rank-0.safetensors' is missing",
    ("checkpoint.json", "cut"): "'checkpoint.json' has been changed or cut off",
    ("checkpoint.json", "turned"): "'checkpoint.json' has been changed or cut off",
    ("checkpoint.json", "gone"): "'checkpoint.json' is missing",
}


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    config, tmp_path, monkeypatch, capsys, file, damage
):
    config = dataclasses.replace(config, save_every=1)
    part = cut(config, monkeypatch, 3)
    assert [p.name for p in whole_checkpoints(part)] == ["checkpoint-3", "checkpoint-2"]
    spoil(part / "checkpoint-3" / file, damage)
    says = rf"checkpoint '{part}/checkpoint-3' is damaged: {DAMAGES[file, damage]}"
    with pytest.warns(UserWarning, match=f"{says}; the checkpoint before it is tried"):
        run = finetune(config)
    assert "going on after step 2 of 5" in capsys.readouterr().out
    assert_same(run, uninterrupted(config, tmp_path))


def test_where_every_checkpoint_is_damaged_the_newest_is_named(config, monkeypatch):
    config = dataclasses.replace(config, method="r-adapter", save_every=1)
    part = cut(config, monkeypatch, 3)
    for checkpoint in whole_checkpoints(part):
        spoil(checkpoint / "rank-0.safetensors", "cut")
    before = content(part)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(
            UserError, match=r"checkpoint-3' is damaged: .*, and no other is left: add --restart true"
        ),
    ):
        finetune(config)
    assert content(part) == before
    assert finetune(dataclasses.replace(config, restart=True)).exists()


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept(config, monkeypatch, keep):
    part = cut(dataclasses.replace(config, save_every=1, keep=keep), monkeypatch, 4)
    assert [p.name for p in whole_checkpoints(part)] == [f"checkpoint-{n}" for n in (4, 3, 2, 1)[:keep]]


def test_no_code_of_a_checkpoint_is_executed(config, monkeypatch):
    """Nothing that resumes a run reads a pickle, whoever may have written it."""
    cut(config, monkeypatch, 3)

    def never(*_args, **_kwargs):
        raise AssertionError("a pickle is read")

    for name in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(name, never)
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
        state, _ = read_tensors(part / "checkpoint-2/rank-0.safetensors")
        weights = [key for key in state if key.startswith("weight/")]
        assert weights
        assert all(".adapter." in key for key in weights) == (method == "r-adapter")
        names = {p.name for p in (part / "checkpoint-2").iterdir()}
        assert names == {MARK, "checkpoint.json", "rank-0.safetensors"}
        sizes[method] = json.loads((finetune(run) / "run.json").read_text())["sizes"]
    trained = sizes["flyp"]["trained_parameters"]
    assert 12 * trained < sizes["flyp"]["checkpoint_bytes"] < 12.5 * trained  # masters and two moments
    assert sizes["r-adapter"]["checkpoint_bytes"] < sizes["flyp"]["checkpoint_bytes"] / 50


def test_seconds_of_both_attempts_count(config, monkeypatch):
    part = cut(config, monkeypatch, 3)
    about = part / "checkpoint-2/checkpoint.json"
    state = json.loads(about.read_text())
    assert 0 < state["seconds"] < 60
    del state["sha256"]
    about.write_text(json.dumps(_sealed(state | {"seconds": 1000.0})))
    assert 1000 < json.loads((finetune(config) / "run.json").read_text())["seconds"] < 1060
