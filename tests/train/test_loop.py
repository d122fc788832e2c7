"""The loop against plain torch loops, its teacher and what it logs."""

from __future__ import annotations

import dataclasses

import open_clip
import pytest
import torch
from picture_sets import loaded
from safetensors.torch import load_file

from tracer.data.batches import TrainingBatches
from tracer.data.build import read_index
from tracer.losses import TracerLoss
from tracer.models.clip import load_clip
from tracer.ops import contrastive_loss
from tracer.schedules import EMA, WMA, Frozen, Uniform
from tracer.train.engine import lr_schedule
from tracer.train.log import read_log
from tracer.train.loop import teacher_schedule
from tracer.train.run import finetune


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


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_the_whole_objective_equals_a_plain_torch_loop(config, zero_stage):
    """Labels, every distillation term, a WMA teacher, penalties and clipping against the eager loss and torch.

    At stage 3 too, where the projections that the penalties see are in pieces.
    """
    changes = {"wma_beta": 0.8, "clip_grad": 0.1, "projection_product": 0.05, "feature": 200.0}
    changes |= {"zero_stage": zero_stage, "projection_orthogonal": 0.2}
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
            tu, tv, teacher_logit_scale = teacher(batch.image, batch.text)
        eager = contrastive_loss(
            u,
            v,
            scale.squeeze(),
            labels=batch.label,
            teacher_image=tu,
            teacher_text=tv,
            teacher_logit_scale=teacher_logit_scale.squeeze(),
            relational=0.9,
            interactive=0.9,
            cross=0.9,
            impl="eager",
        )
        feature = (u - tu).square().mean() + (v - tv).square().mean()
        loss = eager.loss + 0.9 * 200 * feature
        loss = loss + 0.05 * (model.visual.proj @ model.text_projection.T).norm()
        loss = loss + 0.2 * (model.visual.proj.T @ model.visual.proj - torch.eye(32)).norm()
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
        ({"teacher": "ema"}, EMA(6, 0.05, 0.9, 0.2, 1)),
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
    assert teacher_schedule(dataclasses.replace(config, **changes)) == want


def test_training_pictures_are_random_crops(config):
    """Off the centre crop, and another one each time that a picture comes round."""
    index, clip = read_index(config.train_data), load_clip(config.model, config.pretrained)
    options = {"batch_size": 32, "steps": 2, "seed": 0}
    centre = loaded(index, clip.picture_format, "torch")

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


def test_the_losses_own_diagnostics_are_logged_every_few_steps(config):
    """Under the names that the loss gives them, and those of the teacher only where there is one."""
    for method in ("tracer", "flyp"):
        run = dataclasses.replace(config, method=method, output=config.output / method, eval_data={})
        rows = read_log(finetune(run))
        measured = {row["step"]: {name for name in row if "/" in name} for row in rows}
        assert [step for step, names in measured.items() if names] == [5, 6]  # every fifth, and the last
        names = measured[5]
        assert {"student/image_to_text/entropy", "student/text_to_image/accuracy"} <= names
        assert ("pair/image_to_text/kl" in names) == ("kl" in rows[4]) == (method == "tracer")
        if method == "tracer":  # in fp32 the relational term is the mean KL of both directions
            kl = [rows[-1][f"pair/{d}/kl"] for d in ("image_to_text", "text_to_image")]
            assert sum(kl) / 2 == pytest.approx(rows[-1]["relational"], rel=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_the_logged_loss_is_the_mean_of_the_micro_batches(config, monkeypatch, zero_stage):
    """Of the loss, of each term and of the diagnostics, as the loss gave them."""
    seen, forward = [], TracerLoss.forward

    def recorded(*args, **kwargs):
        seen.append(forward(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(TracerLoss, "forward", recorded)
    changes = {"accumulation": 3, "steps": 2, "warmup": 0, "batch_size": 8, "eval_data": {}}
    rows = read_log(finetune(dataclasses.replace(config, zero_stage=zero_stage, **changes)))
    for row, parts in zip(rows, (seen[:3], seen[3:]), strict=True):
        losses = [float(part.loss) for part in parts]
        assert row["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
        assert row["loss"] != pytest.approx(losses[-1], rel=1e-5)
        for name in parts[0].terms:
            assert row[name] == pytest.approx(
                sum(float(p.terms[name]) for p in parts) / 3, rel=1e-5, abs=1e-9
            )
    name = "student/image_to_text/entropy"
    mean = sum(float(part.stats[name]) for part in seen[3:]) / 3
    assert rows[1][name] == pytest.approx(mean, rel=1e-5)
