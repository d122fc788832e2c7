"""The loop end to end in miniature: engine, teacher, log, checkpoints, and what a failed run leaves behind."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
import weakref

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tracer.adapters import add_adapters, fold, read_adapters
from tracer.data.batches import TrainingBatches
from tracer.data.dali import Pictures
from tracer.data.index import read_index
from tracer.data.order import in_order
from tracer.errors import UserError
from tracer.kernels.contrastive import Inputs, Options
from tracer.kernels.contrastive_eager import contrastive_terms
from tracer.models.clip import encode, load_clip
from tracer.models.weights import save_weights
from tracer.schedules import EMA, WMA, Frozen, Uniform
from tracer.teacher import build_teacher
from tracer.train.config import Config
from tracer.train.engine import lr_schedule, start_engine
from tracer.train.log import read_log
from tracer.train.loop import objective, schedule
from tracer.train.run import finetune, fingerprint


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


def test_a_run_is_whole_and_says_what_it_did(config, capsys):
    folder = finetune(config)
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml",
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
    scores = json.loads((folder / "metrics.json").read_text())
    assert set(scores) == {"student", "teacher"}
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


def test_the_loop_equals_a_plain_torch_loop(config):
    """FLYP through DeepSpeed against ten lines of torch with open_clip's own loss on the same batches."""
    config = dataclasses.replace(config, method="flyp", positives=False, clip_grad=0.0)
    student = load_file(finetune(config) / "student.safetensors")
    clip = load_clip(config.model, config.pretrained)
    options = {"batch_size": 16, "steps": 6, "seed": 0, "crop_scale": config.crop_scale}
    decayed = [p for p in clip.model.parameters() if p.ndim >= 2]
    rest = [p for p in clip.model.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(
        groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=config.recipe.weight_decay
    )
    rate = lr_schedule(config, adam)
    for batch in TrainingBatches(read_index(config.train_data), clip, **options):
        u, v, scale = clip.model(batch.image, batch.text)
        open_clip.loss.ClipLoss()(u, v, scale.squeeze()).backward()
        adam.step()
        rate.step()
        adam.zero_grad()
    for name, value in clip.model.state_dict().items():
        # Adam turns the rounding of gradients that are zero in theory (a key bias) into steps: hence atol
        torch.testing.assert_close(student[name], value, rtol=1e-3, atol=1e-3)


def test_the_whole_objective_equals_a_plain_torch_loop(config):
    """Labels, every distillation term, a WMA teacher, penalties and clipping against eager losses and torch."""
    changes = {"wma_beta": 0.8, "clip_grad": 0.1, "projection_product": 0.05, "feature": 200.0}
    config = dataclasses.replace(config, **changes)
    folder = finetune(config)
    clip = load_clip(config.model, config.pretrained)
    model, teacher = clip.model, load_clip(config.model, config.pretrained).model.eval()
    options = {"batch_size": 16, "steps": 6, "seed": 0, "crop_scale": config.crop_scale}
    parts = [[p for p in model.parameters() if (p.ndim >= 2) == matrix] for matrix in (True, False)]
    groups = [{"params": parts[0], "weight_decay": 0.1}, {"params": parts[1], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6)
    rate = lr_schedule(config, adam)
    beta = torch.distributions.Beta(torch.tensor(0.8), torch.tensor(0.8))
    w = beta.log_prob((torch.arange(7) + 0.5) / 7).exp()
    losses, norms = [], []
    for k, batch in enumerate(TrainingBatches(read_index(config.train_data), clip, **options), 1):
        u, v, scale = model(batch.image, batch.text)
        with torch.no_grad():
            tu, tv, teacher_scale = teacher(batch.image, batch.text)
        pairs = u, v, scale.squeeze(), tu, tv, teacher_scale.squeeze(), batch.label, batch.label
        terms, _ = contrastive_terms(Inputs(*pairs), Options(relational=True, interactive=True, cross=True))
        feature = (u - tu).square().mean() + (v - tv).square().mean()
        loss = terms[0] + 0.9 * (terms[1:].sum() + 200 * feature)
        loss = loss + 0.05 * (model.visual.proj @ model.text_projection.T).norm()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        adam.step()
        rate.step()
        adam.zero_grad()
        for mean, value in zip(teacher.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(value.data, float(w[k] / w[: k + 1].sum()))
        losses.append(float(loss.detach()))
    assert min(norms) > 0.1  # every step was clipped
    assert max(norms) > 2 * min(norms)  # by different factors: Adam does not see a constant one
    assert [row["loss"] for row in read_log(folder)] == pytest.approx(losses, rel=1e-3)
    for name, plain in (("student", model), ("teacher", teacher)):
        got = load_file(folder / f"{name}.safetensors")
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-3, msg=f"{name}, {key}")


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, WMA(6, 0.5, 1)),
        ({"wma_beta": 0.8, "teacher_every": 3}, WMA(6, 0.8, 3)),
        ({"teacher": "ema"}, EMA(6, 0.05, 0.9, 0.2, 500)),
        (
            {"teacher": "ema", "ema_start": 0.1, "ema_end": 0.7, "ema_warmup": 0.5, "teacher_every": 2},
            EMA(6, 0.1, 0.7, 0.5, 2),
        ),
        ({"teacher": "uniform"}, Uniform(1)),
        ({"teacher": "uniform", "teacher_every": 4}, Uniform(4)),
        ({"teacher": "frozen"}, Frozen()),
    ],
)
def test_the_teachers_schedule_is_the_one_that_was_set(config, changes, want):
    assert schedule(dataclasses.replace(config, **changes)) == want


def test_training_pictures_are_random_crops(config):
    """Off the centre crop, and another one each time that a picture comes round."""
    index, clip = read_index(config.train_data), load_clip(config.model, config.pretrained)
    options = {"batch_size": 32, "steps": 2, "seed": 0}
    (centre, _), *_ = Pictures(index, clip, in_order(32, 32), 32)

    def epochs(crop_scale: float) -> list[torch.Tensor]:
        batches = list(TrainingBatches(index, clip, crop_scale=crop_scale, **options))
        assert [sorted(batch.index.tolist()) for batch in batches] == [list(range(32))] * 2
        return [batch.image[batch.index.argsort()] for batch in batches]

    def moved(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().mean((1, 2, 3)).median())

    first, second = epochs(config.crop_scale)
    assert moved(first, centre) > 0.03
    assert moved(first, second) > 0.03
    assert moved(epochs(0.2)[0], centre) > 2 * moved(first, centre)  # smaller crops change more


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "amp_bf16"},
        {"zero_stage": 0},
        {"zero_stage": 2},
        {"accumulation": 2},
    ],
)
def test_other_engines_train_too(config, changes):
    folder = finetune(dataclasses.replace(config, steps=2, warmup=0, **changes))
    rows = read_log(folder)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in rows)
    start, student = load_file(config.pretrained), load_file(folder / "student.safetensors")
    assert student["visual.proj"].dtype == torch.float32
    assert not torch.equal(start["visual.proj"], student["visual.proj"])
    # the optimizer's weights, not their rounded copies that a bf16 engine computes with
    assert not torch.equal(student["visual.proj"], student["visual.proj"].bfloat16().float())


def test_learning_rate_rises_then_falls_to_zero(config):
    config = dataclasses.replace(config, steps=10, warmup=4)
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rate, seen = lr_schedule(config, adam), []
    for _ in range(10):
        seen.append(adam.param_groups[0]["lr"])
        adam.step()
        rate.step()
    assert seen[:4] == pytest.approx([0.25, 0.4375, 0.625, 0.8125])
    assert seen[4] == pytest.approx(1.0)
    assert seen[5:] == sorted(seen[5:], reverse=True)
    assert adam.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("place", "left"), [("objective", []), ("save_weights", ["checkpoint-6"])])
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


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_engine_is_gone_when_the_run_is_evaluated(config, monkeypatch, stage):
    engines, alive = [], []

    def start(*args):
        engine = start_engine(*args)
        engines.append(weakref.ref(engine))
        return engine

    def save(*args):
        gc.collect()
        alive.append(engines[0]() is not None)
        save_weights(*args)

    monkeypatch.setattr("tracer.train.loop.start_engine", start)
    monkeypatch.setattr("tracer.train.run.save_weights", save)
    finetune(dataclasses.replace(config, zero_stage=stage))
    assert alive == [False, False]  # student and teacher


def test_an_existing_run_is_not_overwritten(config):
    config.output.mkdir()
    with pytest.raises(UserError, match="exists: choose another --output"):
        finetune(config)


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
    assert rows[-1]["contrastive"] < rows[0]["contrastive"]  # distillation begins at zero, and can only rise
    assert (rows[-1]["relational"] > 1e-5) == (config.method == "tracer")  # a teacher that isn't the student


def test_the_teacher_of_the_adapters_is_the_schedules_average_on_the_shared_trunk(config):
    """Uniform teacher of one step from W = 0: half of the student's adapters, on the very same trunk."""
    changes = {"adapters": True, "adapter_momentum": 0.0, "adapter_alpha": 1.0, "zero_stage": 1}
    folder = finetune(dataclasses.replace(config, teacher="uniform", steps=1, warmup=0, **changes))
    start, teacher = load_file(config.pretrained), load_file(folder / "teacher.safetensors")
    half = {n: v / 2 for n, v in read_adapters(folder / "adapters.safetensors", "tiny-clip").items()}
    for name, value in fold(start | half, 1.0).items():
        torch.testing.assert_close(teacher[name], value, rtol=1e-6, atol=1e-8)


def test_in_the_engine_a_teacher_of_the_adapters_holds_no_trunk(config):
    clip = load_clip(config.model, config.pretrained)
    add_adapters(clip.model)
    teacher = build_teacher(start_engine(dataclasses.replace(config, adapters=True), clip.model), WMA(6))
    student = dict(clip.model.named_parameters())
    for name, value in teacher.module.named_parameters():
        shared = value.data_ptr() == student[name].data_ptr()
        assert shared == (".adapter." not in name), name
    averages = teacher.state_dict()["averages"].values()  # this rank's shards
    assert sum(value.numel() for value in averages) == 4 * 32 * 32


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


def test_a_deepspeed_checkpoint_of_adapters_resumes_bit_for_bit(config, tmp_path):
    """Without the frozen parameters it is a small part of the full one, and nothing is missing from it."""
    config = dataclasses.replace(config, method="r-adapter", warmup=0)
    batch = torch.rand(4, 3, 32, 32), torch.randint(1, 99, (4, 16))

    def engine(adapted: bool = True):
        clip = load_clip(config.model, config.pretrained)
        if adapted:
            add_adapters(clip.model, drop=0.0)
        return start_engine(config, clip.model)

    def step(run) -> None:
        run.backward(objective(config)(*encode(run, *batch)).loss)
        run.step()

    def size(folder) -> int:
        return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

    run, full = engine(), engine(adapted=False)
    step(run)
    step(full)
    run.save_checkpoint(str(tmp_path / "adapters"), exclude_frozen_parameters=True)
    full.save_checkpoint(str(tmp_path / "full"))
    assert size(tmp_path / "adapters") < size(tmp_path / "full") / 50
    resumed = engine()
    resumed.load_checkpoint(str(tmp_path / "adapters"), load_module_strict=False)
    for part in (run, resumed):
        step(part)
    assert all(torch.equal(a, b) for a, b in zip(run.parameters(), resumed.parameters(), strict=True))


def test_too_high_a_momentum_for_the_run_is_said(config, capsys):
    finetune(dataclasses.replace(config, method="r-adapter", eval_data={}))
    out = capsys.readouterr()
    assert "parameters train (" in out.out
    assert "the adapters' average will hold 1% of them" in out.out
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
