"""A run as a folder: what a whole one holds, what decides it, and what a failed one leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tracer.adapters import fold, read_adapters
from tracer.errors import UserError
from tracer.files import aside
from tracer.train.identity import fingerprint
from tracer.train.log import read_log
from tracer.train.run import finetune


def test_a_run_is_whole_and_says_what_it_did(config, capsys):
    folder = finetune(config)
    assert {p.name for p in folder.iterdir()} == {
        ".tracer",
        "config.yaml",
        "identity.json",
        "log.jsonl",
        "tensorboard",
        "student.safetensors",
        "teacher.safetensors",
        "metrics.json",
        "run.json",
    }
    rows = read_log(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert {"loss", "contrastive", "relational", "interactive", "cross", "feature"} <= set(row)
    assert rows[0]["relational"] == pytest.approx(0, abs=1e-6)  # the teacher starts as the student
    assert rows[-1]["relational"] > 1e-4
    assert list((folder / "tensorboard").iterdir())
    assert yaml.safe_load((folder / "config.yaml").read_text())["steps"] == 6
    scores = json.loads((folder / "metrics.json").read_text())["scores"]
    assert set(scores) == {"zero-shot", "student", "teacher"}
    for name in ("student", "teacher"):
        gain = scores[name]["test"]["accuracy"] - scores["zero-shot"]["test"]["accuracy"]
        assert scores[name]["test"]["accuracy_gain"] == pytest.approx(gain)
    assert 0 <= scores["student"]["test"]["accuracy"] <= 1
    assert scores["student"]["test"]["pictures"] == 16


def test_weights_load_in_plain_open_clip_and_the_teacher_is_the_schedules_average(config):
    """Uniform teacher of one step: the mean of start and student, exactly."""
    folder = finetune(dataclasses.replace(config, teacher="uniform", steps=1, warmup=0))
    start = load_file(config.pretrained)
    student, teacher = (load_file(folder / f"{name}.safetensors") for name in ("student", "teacher"))
    assert student.keys() == start.keys() == teacher.keys()
    moved = 0.0
    for name, value in student.items():
        torch.testing.assert_close(teacher[name], (start[name] + value) / 2, rtol=1e-6, atol=1e-7)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3
    model = open_clip.create_model("tiny-clip", pretrained=str(folder / "student.safetensors"))
    torch.testing.assert_close(model.visual.proj, student["visual.proj"])


def test_the_same_settings_give_the_same_weights(config, tmp_path):
    config = dataclasses.replace(config, steps=3)
    a = load_file(finetune(config) / "student.safetensors")
    b = load_file(finetune(dataclasses.replace(config, output=tmp_path / "again")) / "student.safetensors")
    c = load_file(
        finetune(dataclasses.replace(config, output=tmp_path / "other", seed=1)) / "student.safetensors"
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(("place", "left"), [("loop.objective", []), ("run.save_weights", ["checkpoint-6"])])
def test_a_failed_run_leaves_nothing_that_looks_whole(config, monkeypatch, place, left):
    """And nothing at all before the first checkpoint."""

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device", "student.safetensors")

    monkeypatch.setattr(f"tracer.train.{place}", full_disk)
    with pytest.raises(OSError, match="No space left"):
        finetune(config)
    assert not config.output.exists()
    part = config.output.with_name("run.part")
    assert [p.name for p in part.glob("checkpoint*")] == left
    assert part.exists() == bool(left)


def test_too_few_pictures_are_refused_before_a_model_is_loaded(config, monkeypatch, capsys):
    """Regression: the line about the run stood above the refusal, and the folder of a run beside it."""
    monkeypatch.setattr("tracer.train.run.load_clip", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="fewer than one batch of 5000: lower --batch_size or add pictures"):
        finetune(dataclasses.replace(config, batch_size=5000))
    assert "step" not in capsys.readouterr().err
    assert not aside(config.output).exists()


def test_an_existing_run_is_not_overwritten(config):
    config.output.mkdir()
    with pytest.raises(UserError, match="exists: choose another --output"):
        finetune(config)


def test_epochs_are_steps(config, tmp_path):
    config = dataclasses.replace(config, steps=None, epochs=3, batch_size=12, accumulation=2)
    run = finetune(config)
    assert len(read_log(run)) == 3 * 32 // (12 * 2) == 4
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["steps"], settings["epochs"]) == (4, None)
    same = dataclasses.replace(config, steps=4, epochs=None)
    assert (
        fingerprint(same) == fingerprint(config) == json.loads((run / "run.json").read_text())["fingerprint"]
    )
    few = dataclasses.replace(config, epochs=1, warmup=1, output=tmp_path / "few")
    with pytest.raises(UserError, match="--warmup is 1: it must be below the 1 step that --epochs 1 makes"):
        finetune(few)
    assert not aside(few.output).exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "r-adapter"},
        {"method": "r-adapter", "adapter_rank": 4, "precision": "bf16", "accumulation": 2},
        {"method": "r-adapter", "adapter_momentum": 0.0},  # no average: the last step is folded
        {"method": "tracer", "adapters": True},
        {"method": "tracer", "adapters": True, "zero_stage": 3},
    ],
)
def test_adapters_train_alone_and_are_folded(config, changes):
    """What is left are the start's own tensors, but for the layers that adapters were folded into."""
    config = dataclasses.replace(config, warmup=0, **({"adapter_momentum": 0.5} | changes))
    folder = finetune(config)
    start, student = load_file(config.pretrained), load_file(folder / "student.safetensors")
    moved = {name for name, value in student.items() if not torch.equal(value, start[name])}
    folded = ("out_proj.weight", "c_proj.weight", "c_proj.bias")  # the attention's bias starts at zero
    assert moved == {name for name in start if name.endswith(folded)}
    averaged, last = (
        read_adapters(folder / f"{n}.safetensors", "tiny-clip") for n in ("adapters", "adapters_last")
    )
    assert all(value.abs().max() > 0 for value in (*averaged.values(), *last.values()))
    same = all(torch.equal(averaged[name], value) for name, value in last.items())
    assert same == (config.adapter_momentum == 0)
    for name, value in fold(start | averaged, config.adapter_alpha).items():
        assert torch.equal(value, student[name])
    assert (folder / "teacher.safetensors").exists() == (config.method == "tracer")
    rows = read_log(folder)
    # On the same batches, with the same adapters dropped, but hardly moved. Distillation begins at zero.
    still = read_log(finetune(dataclasses.replace(config, lr=1e-9, output=folder.with_name("still"))))
    gains = [before["contrastive"] - row["contrastive"] for row, before in zip(rows, still, strict=True)]
    assert sum(gains) > 0.01
    assert (rows[-1]["relational"] > 1e-5) == (config.method == "tracer")  # a teacher that isn't the student


def test_the_teacher_of_the_adapters_is_the_schedules_average_on_the_shared_trunk(config):
    """Uniform teacher of one step from W = 0: half of the student's adapters, on the very same trunk."""
    changes = {"adapters": True, "adapter_momentum": 0.0, "adapter_alpha": 1.0, "zero_stage": 1}
    folder = finetune(dataclasses.replace(config, teacher="uniform", steps=1, warmup=0, **changes))
    start, teacher = load_file(config.pretrained), load_file(folder / "teacher.safetensors")
    half = {n: v / 2 for n, v in read_adapters(folder / "adapters.safetensors", "tiny-clip").items()}
    for name, value in fold(start | half, 1.0).items():
        torch.testing.assert_close(teacher[name], value, rtol=1e-6, atol=1e-8)


def test_only_what_trains_is_kept(config, tmp_path):
    """Sizes of a run's files and of the optimizer's state against those of full fine-tuning."""
    about = {}
    for method in ("flyp", "r-adapter"):
        run = dataclasses.replace(config, method=method, steps=1, warmup=0, output=tmp_path / method)
        about[method] = json.loads((finetune(run) / "run.json").read_text())["sizes"]
    whole = sum(value.numel() for value in load_file(config.pretrained).values())
    adapters = 4 * 32 * 32  # a layer in each tower, two adapters of width 32 each
    for method, trained in (("flyp", whole), ("r-adapter", adapters)):
        assert about[method]["trained_parameters"] == trained
        assert about[method]["optimizer_bytes"] == pytest.approx(
            8 * trained, rel=0.01
        )  # two moments, and steps
    sizes = about["r-adapter"]
    assert sizes["adapters_bytes"] == pytest.approx(4 * adapters, rel=0.1)  # and a header
    assert sizes["student_bytes"] == pytest.approx(4 * whole, rel=0.01)


def test_what_the_user_should_know_is_printed_and_kept(config, capsys):
    with pytest.warns(UserWarning, match="has 16 pictures") as warned:
        run = finetune(dataclasses.replace(config, method="r-adapter", wma_beta=2.0))
    out = capsys.readouterr()
    assert "parameters train (" in out.out
    notices = json.loads((run / "run.json").read_text())["notices"]
    assert [notice[:35] for notice in notices] == [
        "--wma_beta 2.0 has no effect with -",
        "the adapters' average will hold 1% ",
        "'test' has 16 pictures: an accuracy",
    ]
    assert set(notices) <= {str(one.message) for one in warned}
    assert "adapters.safetensors 0.0" in out.out


def test_fingerprint_changes_with_all_that_decides_a_run(config, drawings, tmp_path):
    """Regression: pictures that were exchanged under the same names left a finished demo's runs in place."""
    data = tmp_path / "data"
    shutil.copytree(drawings, data)
    config = dataclasses.replace(config, train_data=data / "train.csv", eval_data={"t": data / "test.csv"})
    seen = {fingerprint(config)}
    assert fingerprint(dataclasses.replace(config, output=tmp_path / "elsewhere", workers=7)) in seen

    def changed() -> bool:
        new = fingerprint(config)
        return new not in seen and not seen.add(new)

    (data / "circle-00.png").write_bytes((data / "square-01.png").read_bytes())
    assert changed()
    (data / "train.csv").write_text((data / "train.csv").read_text().replace("a square", "one square"))
    assert changed()
    with open(config.pretrained, "ab") as start:
        start.write(b" ")
    assert changed()
    config = dataclasses.replace(config, lr=2e-2)
    assert changed()
