"""The published baselines: what each switch sets, and their terms through DeepSpeed against plain torch loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file

from tracer.data.batches import TrainingBatches
from tracer.data.build import read_index
from tracer.errors import UserError
from tracer.models.clip import encode, load_clip
from tracer.models.heads import Fusion
from tracer.ops import contrastive_loss
from tracer.train.baselines import BASELINES
from tracer.train.config import Config
from tracer.train.engine import lr_schedule, step_seed
from tracer.train.log import read_log
from tracer.train.run import finetune


def dimension(x, k):
    """−mean log LID of the rows of x by their k nearest, from sorted distances."""
    distances = torch.cdist(x.double(), x.double()).sort(1).values[:, 1 : k + 1]
    mean = distances.mean(1)
    return -(mean / (distances[:, -1] - mean)).log().mean()


def gradients(u, v, scale, labels, keep):
    """The gradient of the contrastive loss on both features, by autograd through the definition."""
    loss = contrastive_loss(u, v, scale, labels=labels, impl="eager").loss
    return torch.autograd.grad(loss, (u, v), create_graph=keep, retain_graph=True)


def plain(config, start, weights, batch, model, teacher):
    """The objective of one batch, written out."""
    u, v, scale = encode(model, batch.image, batch.text)
    labels = batch.label if config.positives else None
    loss = contrastive_loss(u, v, scale, labels=labels, impl="eager").loss
    if config.l2_sp:
        loss = loss + config.l2_sp / 2 * sum(
            ((w - s) ** 2).sum() for w, s in zip(weights, start, strict=True)
        )
    if config.ldreg:
        loss = loss + config.ldreg * dimension(u, config.ldreg_neighbours)
    if teacher is not None:
        with torch.no_grad():
            a, b, other = encode(teacher, batch.image, batch.text)
        terms = contrastive_loss(
            u, v, scale, labels=labels, teacher_image=a, teacher_text=b, teacher_logit_scale=other,
            teacher_temperature=config.teacher_temperature, relational=1.0, impl="eager",
        ).terms  # fmt: skip
        loss = loss + config.distill_weight * config.relational * terms["relational"]
        if config.gradient:
            own = gradients(u, v, scale, labels, True)
            goal = gradients(a.requires_grad_(), b.requires_grad_(), other, labels, False)
            far = sum(((x - y) ** 2).mean() for x, y in zip(own, goal, strict=True))
            loss = loss + config.distill_weight * config.gradient * far
    return loss


def dropped(tower, images, share):
    """The features of pictures of which a random share of the patches is left out, from the tower's own parts."""
    x = tower.conv1(images).flatten(2).transpose(1, 2)
    token = tower.class_embedding.expand(len(x), 1, -1)
    x = torch.cat([token, x], 1) + tower.positional_embedding
    keep = max(1, int((x.shape[1] - 1) * (1 - share)))
    chosen = torch.randn(len(x), x.shape[1] - 1).topk(keep, dim=-1).indices
    patches = x[:, 1:].gather(1, chosen[:, :, None].expand(-1, -1, x.shape[2]))
    x = tower.transformer(tower.ln_pre(torch.cat([x[:, :1], patches], 1)))
    return tower.ln_post(x[:, 0]) @ tower.proj


@pytest.mark.parametrize("kind", ["mask", "augmented"])
def test_masked_and_augmented_features_equal_a_plain_torch_loop(config, kind):
    changes = {"mask": 0.75} if kind == "mask" else {"augmented": 2.0}
    changes |= ALONE | {"relational": 5.0, "clip_grad": 0.0, "lr": 3e-3, "eval_data": {}, "steps": 3}
    config = dataclasses.replace(config, warmup=1, **changes)
    start, fusions = load_clip(config.model, config.pretrained), []
    made = Fusion.__init__

    def remembered(self, width):
        made(self, width)
        fusions.append({name: value.clone() for name, value in self.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fusion, "__init__", remembered)
        folder = finetune(config)
    student, log = load_file(folder / "student.safetensors"), read_log(folder)
    assert student.keys() == start.model.state_dict().keys()
    assert load_file(folder / "teacher.safetensors").keys() == student.keys()
    clip, teacher = load_clip(config.model, config.pretrained), start.model.eval()
    trained = dict(clip.model.named_parameters())
    if fusions:
        own = {name: value.clone().requires_grad_() for name, value in fusions[0].items()}
        trained |= own
    groups = [{"params": [w for w in trained.values() if w.ndim >= 2]}]
    groups += [{"params": [w for w in trained.values() if w.ndim < 2], "weight_decay": 0.0}]
    decay = config.recipe.weight_decay
    adam = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay)
    rate = lr_schedule(config, adam)
    options = {"batch_size": 16, "steps": 3, "seed": 0, "crop_scale": config.crop_scale}
    losses = []
    for step, batch in enumerate(TrainingBatches(read_index(config.train_data), clip, **options), 1):
        torch.manual_seed(step_seed(config.seed, step))
        u, v, scale = encode(clip.model, batch.image, batch.text)
        if kind == "mask":
            u = torch.nn.functional.normalize(dropped(clip.model.visual, batch.image, 0.75), dim=1)
        with torch.no_grad():
            a, b, other = encode(teacher, batch.image, batch.text)
        result = contrastive_loss(
            u, v, scale, labels=batch.label, teacher_image=a, teacher_text=b, teacher_logit_scale=other,
            relational=1.0, impl="eager",
        )  # fmt: skip
        loss = result.terms["contrastive"] + config.distill_weight * 5.0 * result.terms["relational"]
        if fusions:
            fused = []
            for tower, pair in (("image", (u, a)), ("text", (v, b))):
                x = torch.cat(pair, 1) @ own[f"{tower}.weight"].T + own[f"{tower}.bias"]
                fused.append(x / x.norm(dim=1, keepdim=True))
            z = own["log_scale"].exp() * fused[0] @ fused[1].T
            positive = (batch.label[:, None] == batch.label).float()
            q = positive / positive.sum(1, keepdim=True)
            far = -(q * z.log_softmax(1)).sum(1).mean() / 2 - (q * z.T.log_softmax(1)).sum(1).mean() / 2
            loss = loss + config.distill_weight * 2.0 * far
        adam.zero_grad()
        loss.backward()
        adam.step()
        rate.step()
        losses.append(loss.item())
    assert [row["loss"] for row in log] == pytest.approx(losses, rel=2e-3)
    for name, value in clip.model.state_dict().items():
        own = student[name]
        if name.endswith(
            "in_proj_bias"
        ):  # Adam makes steps of the rounding of a key bias's gradient, which is 0
            own, value = (bias.view(3, -1)[[0, 2]] for bias in (own, value))
        torch.testing.assert_close(own, value, rtol=2e-3, atol=2e-3)


ALONE = {"interactive": 0.0, "cross": 0.0, "feature": 0.0, "projection_product": 0.0, "teacher": "frozen"}


@pytest.mark.parametrize(
    "changes",
    [
        {"baseline": "l2-sp", "l2_sp": 0.5},
        {"baseline": "ldreg", "ldreg": 0.2, "ldreg_neighbours": 5},
        {"gradient": 300.0} | ALONE,
        {"teacher_temperature": 3.0, "relational": 20.0} | ALONE,
    ],
    ids=["l2-sp", "ldreg", "gradient", "temperature"],
)
def test_a_baseline_equals_a_plain_torch_loop(config, changes):
    config = dataclasses.replace(config, clip_grad=0.0, lr=3e-3, eval_data={}, **changes)
    folder = finetune(config)
    student, log = load_file(folder / "student.safetensors"), read_log(folder)
    clip = load_clip(config.model, config.pretrained)
    teacher = load_clip(config.model, config.pretrained).model.eval() if config.method == "tracer" else None
    weights = list(clip.model.parameters())
    start = [w.detach().clone() for w in weights]
    groups = [{"params": [w for w in weights if w.ndim >= 2]}]
    groups += [{"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0}]
    decay = config.recipe.weight_decay
    adam = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay)
    rate = lr_schedule(config, adam)
    options = {"batch_size": 16, "steps": 6, "seed": 0, "crop_scale": config.crop_scale}
    losses = []
    for batch in TrainingBatches(read_index(config.train_data), clip, **options):
        loss = plain(config, start, weights, batch, clip.model, teacher)
        adam.zero_grad()
        loss.backward()
        adam.step()
        rate.step()
        losses.append(loss.item())
    assert [row["loss"] for row in log] == pytest.approx(losses, rel=2e-3)
    for name, value in clip.model.state_dict().items():
        own = student[name]
        if name.endswith(
            "in_proj_bias"
        ):  # Adam makes steps of the rounding of a key bias's gradient, which is 0
            own, value = (bias.view(3, -1)[[0, 2]] for bias in (own, value))
        torch.testing.assert_close(own, value, rtol=2e-3, atol=2e-3)


def test_a_switch_sets_what_its_source_says():
    made = {name: Config(train_data="x", baseline=name) for name in BASELINES}
    assert (made["flyp"].method, made["flyp"].positives) == ("flyp", False)
    assert (made["flyp-multi"].method, made["flyp-multi"].positives) == ("flyp", True)
    assert (made["l2-sp"].l2_sp, made["ldreg"].ldreg, made["ldreg"].ldreg_neighbours) == (0.01, 0.01, 64)
    assert [made[name].teacher for name in ("frozen", "ema", "wma")] == ["frozen", "ema", "wma"]
    carot = made["carot"]
    # 1.5 times the sum of both directions' KL, of which CRD is the mean
    assert (carot.distill_weight * carot.relational, carot.projection_orthogonal) == (2 * 1.5, 0.2)
    assert (carot.feature, carot.interactive, carot.cross, carot.projection_product) == (0, 0, 0, 0.05)
    assert [made[n].classifier for n in ("linear-probe", "cross-entropy", "lp-ft")] == [
        "probe", "whole", "probe-first",
    ]  # fmt: skip
    assert (made["masked-feature"].mask, made["augmented-feature"].augmented) == (0.75, 1.0)
    for config in made.values():
        config.validate()
        assert Config(**vars(config)) == config  # what a run writes down gives the same settings again


def test_the_users_own_settings_come_first():
    assert Config(train_data="x", baseline="l2-sp", l2_sp=0.3).l2_sp == 0.3
    assert Config(train_data="x", baseline="wma", wma_beta=0.2).wma_beta == 0.2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"baseline": "l2sp"}, r"--baseline is 'l2sp': it must be one of flyp, flyp-multi, linear-probe"),
        ({"l2_sp": -1.0}, "--l2_sp is -1.0: it must be at least 0"),
        ({"ldreg_neighbours": 1}, "--ldreg_neighbours is 1: it must be at least 2"),
        ({"teacher_temperature": 0.0}, "--teacher_temperature is 0.0: it must be above 0"),
        ({"mask": 1.0}, "--mask is 1.0: it must be at least 0 and below 1"),
        ({"method": "flyp", "augmented": 1.0}, "--augmented 1 needs a teacher, which --method flyp has not"),
        ({"augmented": 1.0, "micro_batch": 4}, "--augmented needs the whole weights in each pass: leave out"),
        ({"method": "flyp", "gradient": 1.0}, "--gradient 1 needs a teacher, which --method flyp has not"),
        ({"l2_sp": 0.1, "micro_batch": 4}, "--l2_sp needs the whole weights in each pass: leave out"),
        ({"l2_sp": math.nan}, "--l2_sp is nan: it must be at least 0"),
        # Regression: such runs stood in the report under the name of the baseline.
        (
            {"baseline": "wma", "method": "flyp"},
            "--method flyp is not --baseline wma, whose method is tracer",
        ),
        (
            {"baseline": "ema", "teacher": "frozen"},
            "--teacher frozen is not --baseline ema, whose teacher is",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(config, changes, says):
    with pytest.raises(UserError, match=says):
        finetune(dataclasses.replace(config, **changes))
