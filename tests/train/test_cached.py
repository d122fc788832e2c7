"""Cached gradients: in micro-batches a step has the gradient of one shot, and holds fewer activations."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from tracer.adapters import Adapter
from tracer.data.batches import Batch, TrainingBatches
from tracer.data.build import read_index
from tracer.errors import UserError
from tracer.models.clip import encode, load_clip, texts_stand_alone
from tracer.models.towers import encode_text_first
from tracer.ops import ContrastiveOutput
from tracer.train.config import Config
from tracer.train.engine import full_weights, step_seed
from tracer.train.log import read_log
from tracer.train.loop import Trainer, objective
from tracer.train.run import adapt, finetune

STEPS = 3
RESNET = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def batches(config: Config, count: int = STEPS) -> list[Batch]:
    clip, index = load_clip(config.model, config.pretrained), read_index(config.train_data)
    options = {"batch_size": config.batch_size, "seed": 0, "crop_scale": 0.9}
    return list(TrainingBatches(index, clip, steps=count * config.accumulation, **options))


def model_of(config: Config) -> nn.Module:
    """Return the start, with adapters that are not zero, so that it shows which ones are dropped."""
    model = load_clip(config.model, config.pretrained).model
    if config.adapted:
        adapt(config, model)
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, Adapter):
                nn.init.normal_(module.weight, std=0.1)
    return model


def gradients(config: Config, model: nn.Module | None = None) -> tuple[list[Tensor], list[dict]]:
    """Return the whole gradient of each of ``STEPS`` steps, in one vector, and what the steps log."""
    trainer = Trainer(config, model or model_of(config))
    engine, seen = trainer.engine, []
    step, trained = engine.step, [p for p in engine.module.parameters() if p.requires_grad]

    def recorded() -> None:
        if engine.is_gradient_accumulation_boundary():
            seen.append(torch.cat([safe_get_full_grad(p).float().flatten() for p in trained]))
        step()

    engine.step = recorded
    data = iter(batches(config))
    torch.manual_seed(3)
    logged = [trainer.step(n, islice(data, config.accumulation), n == STEPS) for n in range(1, STEPS + 1)]
    engine.destroy()
    return seen, logged


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def assert_equal_steps(got: tuple, want: tuple, tolerance: float = 1e-5) -> None:
    assert len(got[0]) == len(want[0]) == STEPS
    for mine, whole in zip(got[0], want[0], strict=True):
        assert error(mine, whole) < tolerance
    for mine, whole in zip(got[1], want[1], strict=True):
        assert mine.keys() == whole.keys()
        for name in mine.keys() - {"step_seconds"}:
            if name.endswith("agreement"):  # of the best matches: among equal captions rounding chooses
                continue
            assert float(mine[name]) == pytest.approx(float(whole[name]), rel=10 * tolerance, abs=1e-6), name


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "tracer", "projection_orthogonal": 0.01},
        {"method": "tracer", "accumulation": 2},
        {"method": "r-adapter", "adapter_drop": 0.5, "accumulation": 2},
        {"method": "tracer", "adapters": True, "adapter_drop": 0.5},
    ],
    ids=["tracer", "tracer, accumulated", "r-adapter, accumulated", "adapters with a teacher"],
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_gradient_is_that_of_one_shot(config, stage, changes):
    """Gradients, losses, terms and diagnostics of every step; 16 pairs in micro-batches of 6, 5 and 5."""
    config = dataclasses.replace(config, lr=1e-3, zero_stage=stage, **changes)
    config = dataclasses.replace(config, wma_beta=1.0, feature=200.0)
    assert_equal_steps(gradients(dataclasses.replace(config, micro_batch=6)), gradients(config))


@pytest.mark.parametrize("micro_batch", [1, 4, 15, 16, 99])
def test_any_micro_batch_will_do(config, micro_batch):
    config = dataclasses.replace(config, lr=1e-3)
    assert_equal_steps(gradients(dataclasses.replace(config, micro_batch=micro_batch)), gradients(config))


@pytest.mark.parametrize(
    ("precision", "stage"),
    [("amp_bf16", 1), ("amp_bf16", 3), ("bf16", 1), ("bf16", 2), ("fp16", 1), ("fp16", 2), ("fp16", 3)],
)
def test_in_low_precision_the_gradient_is_that_of_one_shot_but_for_rounding(
    config, tmp_path, precision, stage
):
    changes = {"precision": precision, "zero_stage": stage, "projection_product": 0.0, "lr": 1e-5}
    if precision == "fp16":  # a loss scale at which the first step does not overflow
        changes["deepspeed"] = tmp_path / "scale.json"
        changes["deepspeed"].write_text(json.dumps({"fp16": {"initial_scale_power": 8}}))
    config = dataclasses.replace(config, **changes)
    got, want = gradients(dataclasses.replace(config, micro_batch=6)), gradients(config)
    assert got[1][0]["skipped"] == want[1][0]["skipped"] == 0
    assert error(got[0][0], want[0][0]) < 2e-2


class Dropping(nn.Module):
    """A layer followed by dropout."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.dropout = layer, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.layer(x))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_dropout_is_restored(config, stage):
    """Against one graph over all micro-batches in plain torch, with the random numbers of the first pass."""
    config = dataclasses.replace(config, method="flyp", zero_stage=stage, micro_batch=6, lr=1e-3)

    def dropping() -> nn.Module:
        model = model_of(config)
        model.visual.ln_post, model.ln_final = Dropping(model.visual.ln_post), Dropping(model.ln_final)
        return model

    got = gradients(config, dropping())[0][0]
    model, batch = dropping(), batches(config, 1)[0]
    assert encode_text_first(model)  # as in the loop: the towers draw their random numbers in turn
    torch.manual_seed(step_seed(config.seed, 1))
    parts = zip(batch.image.tensor_split(3), batch.text.tensor_split(3), strict=True)
    image, text, scale = zip(*(encode(model, *part) for part in parts), strict=True)
    objective(config, model)(torch.cat(image), torch.cat(text), scale[0], labels=batch.label).loss.backward()
    assert error(got, torch.cat([p.grad.flatten() for p in model.parameters()])) < 1e-5
    # and a step after it draws other numbers
    seen = gradients(config, dropping())[0]
    assert error(seen[0], got) < 1e-6
    assert error(seen[1], got) > 0.1


def test_adapters_are_dropped_by_one_pattern_in_all_passes_of_a_batch(config, monkeypatch):
    """Anew for each batch, as the seed says, whatever other random numbers are drawn."""
    factors, forward = [], Adapter.forward

    def recorded(self, x):
        if self.training:
            factors.append((id(self), float(self.factor)))
        return forward(self, x)

    monkeypatch.setattr(Adapter, "forward", recorded)
    config = dataclasses.replace(config, method="r-adapter", adapter_drop=0.5, micro_batch=6, accumulation=2)
    passes, adapters = 2 * 3, 4
    gradients(config)
    assert len(factors) == STEPS * 2 * passes * adapters
    assert {factor for _, factor in factors} == {0.0, 2.0}
    patterns = []
    for batch in range(STEPS * 2):
        of_batch = factors[batch * passes * adapters : (batch + 1) * passes * adapters]
        assert len(set(of_batch)) == adapters  # one factor for each adapter
        patterns.append(tuple(factor for _, factor in of_batch[:adapters]))
    assert len(set(patterns)) > 2
    seen = [factor for _, factor in factors]
    factors.clear()
    torch.rand(5)
    gradients(dataclasses.replace(config, micro_batch=None))
    assert [f for _, f in factors] == [f for n in range(STEPS * 2) for f in seen[24 * n : 24 * n + 4]]


def infinite(loss: nn.Module) -> Callable[..., ContrastiveOutput]:
    """Return the loss plus infinity: its gradient is finite."""

    def call(*args, **kwargs) -> ContrastiveOutput:
        output = loss(*args, **kwargs)
        return output._replace(loss=output.loss + math.inf)

    return call


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_loss_that_is_not_finite_skips_the_step(config, stage):
    changes = {"zero_stage": stage, "micro_batch": 6, "projection_product": 0.0, "warmup": 0}
    config = dataclasses.replace(config, **changes)
    trainer = Trainer(config, model_of(config))
    good, bad = batches(config, 2)
    bad.image[9] = math.nan  # in the second micro-batch
    assert trainer.step(1, [good], False)["skipped"] == 0
    rate, weights = trainer.engine.get_lr(), full_weights(trainer.engine)
    assert trainer.step(2, [bad], False)["skipped"] == 1
    assert trainer.engine.get_lr() == rate
    loss, trainer.loss = trainer.loss, infinite(trainer.loss)
    assert trainer.step(3, [good], False)["skipped"] == 1
    trainer.loss = loss
    after = full_weights(trainer.engine)
    assert all(torch.equal(value, after[name]) for name, value in weights.items())
    assert trainer.step(4, [good], False)["skipped"] == 0
    assert not torch.equal(weights["visual.proj"], full_weights(trainer.engine)["visual.proj"])
    trainer.engine.destroy()


def test_a_layer_that_normalises_over_the_batch_is_refused(config, tmp_path):
    model = tmp_path / "tiny-resnet.json"
    model.write_text(json.dumps(RESNET))
    config = dataclasses.replace(config, model=str(model), pretrained=None)
    resnet = load_clip(str(model), None).model
    with pytest.raises(UserError, match=r"'visual.bn1' \(BatchNorm2d\) .* give --lock_batchnorm true"):
        Trainer(dataclasses.replace(config, micro_batch=6), resnet)
    Trainer(dataclasses.replace(config, micro_batch=16), resnet).engine.destroy()  # one micro-batch


def texts_seen(config: Config, model: nn.Module, batch: Batch) -> list[int]:
    """Return how many texts each pass of a step through the student's text tower takes."""
    seen: list[int] = []
    trainer = Trainer(config, model)
    trainer.engine.module.token_embedding.register_forward_hook(
        lambda _m, args, _o: seen.append(len(args[0]))
    )
    trainer.step(1, [batch], False)
    trainer.engine.destroy()
    return seen


def test_a_distinct_caption_is_encoded_once_for_each_micro_batch(config):
    """Twice with the second pass. A text tower with dropout draws for each row, so there all rows are encoded."""
    config = dataclasses.replace(config, method="flyp", micro_batch=6)
    batch = batches(config, 1)[0]
    distinct = [len(set(map(tuple, part.tolist()))) for part in batch.text.tensor_split(3)]
    assert sum(distinct) < 16
    assert texts_seen(config, model_of(config), batch) == distinct * 2
    assert texts_seen(dataclasses.replace(config, micro_batch=None), model_of(config), batch) == [16]
    model = model_of(config)
    model.ln_final = Dropping(model.ln_final)
    assert texts_seen(config, model, batch) == [6, 5, 5] * 2


def test_texts_stand_alone_only_where_they_do(config):
    model = model_of(config)
    assert texts_stand_alone(model)
    model.visual.ln_post = Dropping(model.visual.ln_post)
    assert texts_stand_alone(model)
    adapt(dataclasses.replace(config, method="r-adapter"), model)
    assert texts_stand_alone(model)
    model.transformer.resblocks[0].attn.dropout = 0.1
    assert not texts_stand_alone(model)
    assert not texts_stand_alone(nn.Linear(2, 2))


class Held:
    """Bytes that autograd holds for backward passes, weights and inputs apart: now, and at most."""

    def __init__(self, apart: list[Tensor]) -> None:
        self.apart = {x.untyped_storage().data_ptr() for x in apart}
        self.now = self.peak = 0
        self.users: dict[int, int] = {}  # of each storage

    def pack(self, tensor: Tensor) -> Kept:
        return Kept(self, tensor)

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.tensor)


class Kept:
    """A saved tensor, counted as long as it lives."""

    def __init__(self, held: Held, tensor: Tensor) -> None:
        self.held, self.tensor, storage = held, tensor, tensor.untyped_storage()
        self.key = storage.data_ptr()
        self.bytes = 0 if self.key in held.apart else storage.nbytes()
        held.users[self.key] = held.users.get(self.key, 0) + 1
        if held.users[self.key] == 1:
            held.now += self.bytes
            held.peak = max(held.peak, held.now)

    def __del__(self) -> None:
        self.held.users[self.key] -= 1
        if not self.held.users[self.key]:
            self.held.now -= self.bytes


def activations(config: Config) -> int:
    trainer, batch = Trainer(config, model_of(config)), batches(config, 1)[0]
    held = Held([*trainer.engine.parameters(), batch.image])
    with held.hooks():
        trainer.step(1, [batch], False)
    trainer.engine.destroy()
    del trainer
    gc.collect()
    assert held.now == 0
    return held.peak


def test_the_peak_of_activations_falls_with_the_micro_batch(config):
    """Of what autograd holds, counted byte by byte: a quarter of the pairs, a quarter of the bytes."""
    peak = {n: activations(dataclasses.replace(config, micro_batch=n)) for n in (None, 8, 4, 2)}
    for n in (8, 4, 2):
        assert peak[n] < (n / 16 + 0.05) * peak[None], peak


def test_a_run_in_micro_batches_is_the_run_without(config, tmp_path):
    """From the settings of the command to its log."""
    config = dataclasses.replace(config, lr=1e-4, warmup=0, eval_data={})
    folders = [
        finetune(dataclasses.replace(config, micro_batch=n, output=Path(tmp_path / str(n))))
        for n in (None, 5)
    ]
    whole, cached = (read_log(folder) for folder in folders)
    assert [row["loss"] for row in cached] == pytest.approx([row["loss"] for row in whole], rel=1e-5)
    assert cached[-1]["kl"] == pytest.approx(whole[-1]["kl"], rel=1e-3)
    assert (
        json.loads((folders[0] / "run.json").read_text())["fingerprint"]
        != json.loads((folders[1] / "run.json").read_text())["fingerprint"]
    )


@pytest.mark.parametrize("number", [0, -3])
def test_an_impossible_micro_batch_is_refused(config, number):
    with pytest.raises(UserError, match=f"--micro_batch is {number}: it must be at least 1"):
        finetune(dataclasses.replace(config, micro_batch=number))
