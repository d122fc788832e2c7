"""The DeepSpeed engine: optimizer, learning rate, precisions and what it holds."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import weakref
from pathlib import Path

import deepspeed
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from tracer.adapters import add_adapters
from tracer.files import write_tensors
from tracer.models.clip import encode, load_clip
from tracer.models.weights import save_weights
from tracer.schedules import WMA
from tracer.teacher import build_teacher
from tracer.train.engine import LogitScaleBound, full_weights, lr_schedule, parameter_groups, start_engine
from tracer.train.log import read_log
from tracer.train.loop import Trainer, objective
from tracer.train.run import finetune


@pytest.mark.parametrize(
    "changes",
    [
        {"grad_checkpointing": True, "zero_stage": 3},
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
        run.backward(objective(config, run)(*encode(run, *batch)).loss)
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


def test_weight_decay_falls_on_the_matrices_that_train_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    model[2].requires_grad_(False)
    decayed, rest = parameter_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3
    assert rest["weight_decay"] == 0
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert [id(p) for p in rest["params"]] == [id(model[0].bias), id(model[1].weight), id(model[1].bias)]


@pytest.mark.parametrize("method", ["tracer", "r-adapter"])
@pytest.mark.parametrize(
    ("precision", "stage"),
    [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("amp_bf16", 0), ("amp_bf16", 1), ("amp_bf16", 2)]
    + [("amp_bf16", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]  # bf16 at stage 0 is refused
    + [("fp16", 1), ("fp16", 3)],
)
def test_training_starts_at_the_float32_weights_exactly(config, precision, stage, method):
    """Regression: DeepSpeed makes the master weights of a bf16 engine from the rounded ones."""
    changes = {"precision": precision, "zero_stage": stage, "lr": 1e-100, "method": method, "eval_data": {}}
    changes |= {"steps": 12 if precision == "fp16" else 2}  # the first ones find the loss scale
    changes |= {"warmup": 0, "projection_product": 0.0, "adapter_rank": 4, "wma_beta": 1.0}
    folder = finetune(dataclasses.replace(config, **changes))
    start = load_file(config.pretrained)
    for file in folder.glob("*.safetensors"):
        if not file.stem.startswith("adapters"):
            for name, value in load_file(file).items():
                assert torch.equal(value, start[name]), f"{file.name}, {name}"


def test_a_frozen_parameter_of_a_bf16_run_is_not_rounded(config, tmp_path):
    """MobileCLIP and others have frozen position embeddings, in full fine-tuning too."""
    import tracer.train.run as run

    clip = load_clip(config.model, config.pretrained)
    state = {n: p.detach().clone() for n, p in clip.model.named_parameters()}
    rounded = {n: v.bfloat16().float() for n, v in state.items()}
    trained = run.Trained(student=rounded, teacher=dict(rounded), last=dict(rounded), sizes={})
    frozen = {"positional_embedding": state["positional_embedding"]}
    for weights in run._exact(trained, frozen)[:3]:
        assert torch.equal(weights["positional_embedding"], state["positional_embedding"])
        assert torch.equal(weights["visual.proj"], rounded["visual.proj"])


@pytest.mark.parametrize(
    ("precision", "stage"),
    [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3), ("fp16", 1)]
    + [("fp16", 2), ("fp16", 3)],
)
def test_the_logit_scale_is_bounded_at_every_stage(config, precision, stage):
    """The optimizer's float32 weight and the one that the model computes with, and nothing else."""
    clip = load_clip(config.model, config.pretrained)
    clip.model.logit_scale.data.fill_(4.7)
    engine = start_engine(dataclasses.replace(config, precision=precision, zero_stage=stage), clip.model)
    before = full_weights(engine)
    assert float(before["logit_scale"]) > math.log(100) + 0.09
    LogitScaleBound(engine)()
    after = full_weights(engine)
    assert float(after["logit_scale"]) == pytest.approx(math.log(100), abs=1e-6)
    with deepspeed.zero.GatheredParameters(engine.module.logit_scale, enabled=stage == 3):
        assert float(engine.module.logit_scale) <= math.log(100) * 1.001
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name != "logit_scale")


def test_a_frozen_logit_scale_is_left_alone(config):
    clip = load_clip(config.model, config.pretrained)
    clip.model.logit_scale.requires_grad_(False).fill_(4.7)
    engine = start_engine(config, clip.model)
    LogitScaleBound(engine)()
    assert float(engine.module.logit_scale) == pytest.approx(4.7)


def test_a_run_keeps_the_logit_scale_at_its_bound(config, monkeypatch):
    """From weights above it, against a gradient that raises it."""
    state = load_file(config.pretrained) | {"logit_scale": torch.tensor([4.7])}
    write_tensors(Path(config.pretrained), state)
    seen = []
    step = Trainer.step

    def recorded(self, *args):
        scalars = step(self, *args)
        seen.append(float(self.engine.module.logit_scale))
        return scalars

    monkeypatch.setattr(Trainer, "step", recorded)
    finetune(dataclasses.replace(config, lr=1e-5, steps=3, warmup=0, eval_data={}))
    assert len(seen) == 3
    assert all(4.59 < value <= math.log(100) + 1e-6 for value in seen)


@pytest.mark.parametrize("changes", [{"freeze": "image"}, {"freeze": "all_but_projections", "zero_stage": 3}])
def test_a_frozen_part_stays_as_it_was_bit_for_bit(config, capsys, changes):
    """In bf16, in which the engine rounds it; the teacher has it too."""
    changes = {"precision": "bf16", "steps": 3, "warmup": 0, "eval_data": {}} | changes
    folder = finetune(dataclasses.replace(config, **changes))
    start = load_file(config.pretrained)
    for name in ("student", "teacher"):
        state = load_file(folder / f"{name}.safetensors")
        moved = {key for key, value in state.items() if not torch.equal(value, start[key])}
        if changes["freeze"] == "image":
            assert "transformer.resblocks.0.mlp.c_fc.weight" in moved
            assert not any(key.startswith("visual.") for key in moved)
        else:
            assert moved == {"text_projection", "visual.proj", "logit_scale"}
    assert "parameters train (" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("lock", [False, True])
def test_batchnorm_is_locked_where_asked(config, tmp_path, precision, lock):
    path = tmp_path / "tiny-resnet.json"
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    path.write_text(json.dumps(TINY | {"vision_cfg": resnet}))
    torch.manual_seed(0)
    start = {n: v.clone() for n, v in load_clip(str(path), None).model.state_dict().items()}
    save_weights(start, tmp_path / "resnet.safetensors")
    changes = {
        "model": str(path),
        "pretrained": str(tmp_path / "resnet.safetensors"),
        "steps": 2,
        "warmup": 0,
    }
    config = dataclasses.replace(config, lock_batchnorm=lock, precision=precision, eval_data={}, **changes)
    folder = finetune(config)
    for name in ("student", "teacher"):
        state = load_file(folder / f"{name}.safetensors")
        assert torch.equal(state["visual.bn1.running_mean"], start["visual.bn1.running_mean"]) == lock
        assert not torch.equal(state["visual.bn1.weight"], start["visual.bn1.weight"])


def test_the_random_numbers_of_a_step_depend_on_the_seed_and_the_step_alone(config, monkeypatch):
    """So that every rank draws the same, also where the ranks have drawn other numbers before."""
    draws: list[float] = []
    monkeypatch.setattr("tracer.train.loop.set_drops", lambda *_: draws.append(float(torch.rand(()))))
    changes = {"method": "flyp", "eval_data": {}, "steps": 3, "warmup": 0}
    config = dataclasses.replace(config, **changes)
    finetune(config)
    first = list(draws)
    assert len(set(first)) == len(first) == 3
    draws.clear()

    def drawn_before(*args):
        torch.rand(5)
        return start_engine(*args)

    monkeypatch.setattr("tracer.train.loop.start_engine", drawn_before)
    finetune(dataclasses.replace(config, output=config.output.with_name("again")))
    assert draws == first
