"""R-Adapter: identity at the start, what trains, dropping, averaging, and what is refused."""

from __future__ import annotations

import copy
import dataclasses

import open_clip
import pytest
import torch
from adapter_models import (
    DIM,
    KINDS,
    LAYERS,
    adapted,
    adapter_parameters,
    build,
    features,
    inputs,
    randomise,
)
from torch import nn

from tracer._frozen import multiply_once
from tracer.adapters import Adapter, adapter_schedule, adapter_state, add_adapters, fold, load_adapters
from tracer.losses import MPMNCELoss
from tracer.models.clip import encode
from tracer.teacher import WMA, build_teacher
from tracer.train.config import Config
from tracer.train.engine import start_engine


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_step_0_is_the_pretrained_model_bit_for_bit(kind, rank):
    model = build(kind).requires_grad_(False)  # torch may round differently for weights that want gradients
    multiply_once(model)  # and for activations in another order
    for training in (False, True):
        with torch.no_grad():
            before = features(copy.deepcopy(model).train(training))
        adapted = copy.deepcopy(model)
        add_adapters(adapted, rank=rank)
        with torch.no_grad():
            after = features(adapted.train(training))
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert sum(isinstance(m, Adapter) for m in adapted.modules()) == 2 * LAYERS.get(kind, 3)


def test_adapters_of_vit_b_16_are_the_published_share(capsys):
    model = open_clip.create_model("ViT-B-16", device="meta")
    share = add_adapters(model)
    with capsys.disabled():
        print(f"\nViT-B-16, full rank: {share}")
    assert (
        share.adapters
        == 12 * 2 * (768**2 + 512**2)
        == sum(p.numel() for p in adapter_parameters(model).values())
    )
    assert share.pretrained == 149_620_737
    assert str(share) == "20,447,232 of 149,620,737 parameters train (13.7%)"


def test_gradients_reach_the_adapters_and_nothing_else():
    model = build()
    pretrained = set(dict(model.named_parameters()))
    add_adapters(model, drop=0.0)
    randomise(model)
    u, v, scale = encode(model.train(), *inputs(model))
    MPMNCELoss()(u, v, scale).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name not in pretrained)
        assert (parameter.grad is None) == (name in pretrained)
        if parameter.grad is not None:
            assert parameter.grad.norm() > 0


@pytest.mark.parametrize("rank", [None, 3])
def test_training_from_zero_lowers_the_loss(rank):
    """Low rank too: one factor starts at zero, the other does not."""
    model = build()
    add_adapters(model, rank=rank, drop=0.0)
    adam = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(10):
        u, v, _ = encode(model.train(), *inputs(model, 6))
        loss = MPMNCELoss()(u, v, torch.tensor(10.0))
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.abs().max() > 0 for parameter in adapter_parameters(model).values())


def test_only_the_asked_for_tower():
    model = build()
    add_adapters(model, towers=("text",))
    assert {name.partition(".")[0] for name in adapter_parameters(model)} == {"transformer"}
    assert not any(p.requires_grad for p in model.visual.parameters())


def test_cocas_decoder_stays_as_it_is():
    model = build("coca")
    add_adapters(model)
    assert not any(isinstance(m, Adapter) for m in model.text_decoder.modules())
    assert model(*inputs(model))["logits"].isfinite().all()


@pytest.mark.parametrize("rank", [None, 2])
def test_dropping_keeps_the_expectation(rank):
    torch.manual_seed(0)
    adapter = Adapter(4, rank, 0.2, torch.ones(1))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, 3, 4)
    added = adapter.eval()(x) - x
    w = adapter.weight if rank is None else adapter.down @ adapter.up
    torch.testing.assert_close(added, x @ w, rtol=1e-5, atol=1e-6)
    adapter.train()
    draws = 2000
    kept = 0
    for _ in range(draws):
        out = adapter(x) - x
        if torch.equal(out, torch.zeros_like(out)):  # dropped for the whole batch
            continue
        torch.testing.assert_close(out, added / 0.8, rtol=1e-4, atol=1e-5)
        kept += 1
    # 4 standard deviations of a share of 2000 draws with p = 0.8
    assert kept / draws == pytest.approx(0.8, abs=4 * (0.8 * 0.2 / draws) ** 0.5)


def test_adapters_are_dropped_one_by_one_and_a_seed_repeats_it():
    model = build()
    add_adapters(model, drop=0.5)
    randomise(model)
    model.train()

    def dropped(seed: int) -> tuple[bool, ...]:
        torch.manual_seed(seed)
        model.zero_grad()
        u, v = features(model)
        (u.square() * torch.arange(DIM)).sum().add((v.square() * torch.arange(DIM)).sum()).backward()
        # absent gradients would stall ranks that dropped another adapter
        return tuple(bool((p.grad == 0).all()) for p in adapter_parameters(model).values())

    patterns = {seed: dropped(seed) for seed in range(8)}
    assert patterns == {seed: dropped(seed) for seed in range(8)}
    assert len(set(patterns.values())) > 4
    assert len({sum(p) for p in patterns.values()} - {0, 6}) > 1  # not all at once


@pytest.mark.parametrize("kind", ["openai", "siglip"])
def test_activation_checkpointing_recomputes_the_same_draw(kind):
    model = build(kind)
    add_adapters(model, drop=0.5)
    randomise(model)
    model.train()
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        model.zero_grad()
        u, v = features(model)
        (u @ v.T).trace().backward()
        grads.append([p.grad.clone() for p in adapter_parameters(model).values()])
    assert any((g == 0).all() for g in grads[0])
    assert any((g != 0).any() for g in grads[0])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_an_adapted_tower_compiles_into_one_graph():
    model = build()
    add_adapters(model, drop=0.5)
    randomise(model)
    image, _ = inputs(model)
    model.train()
    compiled = torch.compile(model.visual, backend="aot_eager", fullgraph=True)
    grads = []
    for tower in (model.visual, compiled):
        torch.manual_seed(3)
        model.zero_grad()
        tower(image).square().sum().backward()
        grads.append([p.grad.clone() for p in model.visual.parameters() if p.requires_grad])
    assert any((g == 0).all() for g in grads[0])
    for plain, in_one_graph in zip(*grads, strict=True):
        torch.testing.assert_close(in_one_graph, plain)


def test_adapter_schedule_gives_the_moving_average_of_the_adapters():
    model = build()
    add_adapters(model)
    average = build_teacher(model, adapter_schedule(total_steps=20))
    expected = {name: p.detach().double() for name, p in adapter_parameters(model).items()}
    for step in range(1, 21):
        randomise(model, std=float(step))
        average.update(step)
        for name, p in adapter_parameters(model).items():
            expected[name] = 0.999 * expected[name] + 0.001 * p.detach().double()
    state = average.gather()
    assert state.keys() == model.state_dict().keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name].double(), value, rtol=1e-5, atol=1e-7)
    assert average.state_dict()["averages"].keys() == expected.keys()


def test_a_teacher_of_the_adapters_shares_the_trunk():
    model = build()
    pretrained = copy.deepcopy(model).requires_grad_(False)
    add_adapters(model)
    adapters = adapter_parameters(model)
    teacher = build_teacher(model, WMA(total_steps=2))
    for name, mine in teacher.module.named_parameters():
        assert (mine is model.get_parameter(name)) == (name not in adapters)
    own = {p.untyped_storage().data_ptr() for p in teacher.module.parameters()}
    own -= {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(own) == len(adapters)
    assert teacher.state_dict()["averages"].keys() == adapters.keys()

    image, text = inputs(model)
    before = pretrained(image, text)[0]
    randomise(model)  # the student moves, the teacher does not
    assert torch.equal(teacher.encode(image, text)[0], before)
    assert not torch.allclose(model(image, text)[0], before, atol=1e-2)
    teacher.update(1)
    pretrained.load_state_dict(fold(teacher.gather(), 1.0))
    torch.testing.assert_close(teacher.encode(image, text)[0], pretrained(image, text)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2, "precision": "bf16"}, {"zero_stage": 3}],
    ids=["stage 0", "stage 1", "stage 2, bf16", "stage 3"],
)
def test_under_deepspeed_the_average_is_of_the_adapters_and_the_trunk_is_shared(changes, tmp_path):
    config = dataclasses.replace(
        Config(train_data=tmp_path, steps=4, warmup=0, lr=1e-2, weight_decay=0.0, clip_grad=0.0), **changes
    )
    model = build()
    pretrained = {name: value.clone() for name, value in model.state_dict().items()}
    add_adapters(model, drop=0.0)
    names = list(adapter_parameters(model))
    engine = start_engine(config, model)
    average = build_teacher(engine, WMA(config.steps))
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    for name, mine in average.module.named_parameters():
        assert (mine is engine.module.get_parameter(name)) == (name not in names)
    image, text = inputs(engine.module)
    for step in range(1, 5):
        u, v, scale = encode(engine, image.to(dtype), text)
        engine.backward(MPMNCELoss()(u, v, scale))
        engine.step()
        average.update(step)
    state = average.gather()
    for name, value in pretrained.items():
        torch.testing.assert_close(state[name], value.to(dtype).to(value.dtype))
    # Half-way between nothing and lr per step: the average has moved, and only the adapters have.
    assert all(1e-3 < state[name].abs().mean() < 4e-2 for name in names)
    plain = build()
    plain.load_state_dict(fold(pretrained | adapter_state(state), 1.0))
    ours = encode(average.encode, image, text)[0].float()
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(ours, encode(plain, image, text)[0], rtol=0, atol=tolerance)


def without(state: dict, end: str) -> dict:
    return {key: value for key, value in state.items() if not key.endswith(end)}


def foreign() -> nn.Module:
    """A text tower of transformer layers that no name here fits."""
    model = build("siglip")
    model.text.transformer = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2)
    return model


def resnet() -> nn.Module:
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    return open_clip.CLIP(embed_dim=DIM, vision_cfg=vision, text_cfg=text)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda: add_adapters(resnet()),
            "the visual tower is a ModifiedResNet, .* adapt the 'text' tower alone",
        ),
        (
            lambda: add_adapters(foreign()),
            "the text tower is a TextTransformer, .* adapt the 'visual' tower alone",
        ),
        (lambda: add_adapters(build(), rank=0), "rank is 0: it must be from 1 to 32, the width of visual"),
        (lambda: add_adapters(build(), rank=17), "from 1 to 16, the width of transformer.resblocks.0"),
        (lambda: add_adapters(build(), drop=1.0), "drop is 1.0: it must be at least 0 and below 1"),
        (lambda: add_adapters(build(), towers=("audio",)), "unknown tower 'audio': choose from visual, text"),
        (lambda: add_adapters(build(), towers=()), "no tower to adapt: choose from visual, text"),
        (lambda: add_adapters(nn.Linear(2, 2)), "a Linear has no visual tower"),
        (lambda: add_adapters(adapted()), "has adapters already: add them only once"),
        (lambda: fold(adapted().state_dict(), 1.5), r"alpha is 1.5: it must be from 0 \(pretrained\)"),
        (lambda: fold(adapted().state_dict(), -0.1), r"alpha is -0.1: it must be from 0 \(pretrained\)"),
        (
            lambda: fold(adapted().state_dict(), float("nan")),
            r"alpha is nan: it must be from 0 \(pretrained\)",
        ),
        (lambda: fold(fold(adapted().state_dict(), 0.5), 0.5), "folded already, or never had any"),
        (lambda: fold(without(adapted(rank=2).state_dict(), ".up"), 0.5), "half of the adapter of 'visual"),
        (lambda: fold(without(adapted(rank=2).state_dict(), ".down"), 0.5), "half of the adapter of 'visual"),
        (
            lambda: fold(build().state_dict() | adapter_state(adapted("siglip").state_dict()), 0.5),
            "another model: it has no 'visual.trunk.blocks.0.attn.proj' of width 96",
        ),
        (
            lambda: load_adapters(build(), adapter_state(adapted("siglip").state_dict())),
            r"'text.transformer.resblocks.0.attn.out_proj.adapter.weight' is \[16, 16\] in them and missing here",
        ),
        (
            lambda: load_adapters(adapted(rank=2), adapted(rank=3).state_dict()),
            r"out_proj.adapter.down' is \[16, 3\] in them and \[16, 2\] here",
        ),
        (
            lambda: load_adapters(adapted(), adapted(rank=3).state_dict()),
            r"\[16, 3\] in them and missing here",
        ),
        (
            lambda: load_adapters(adapted(), adapted(towers=("text",)).state_dict()),
            r"visual.* is missing in them and \[32, 32\] here",
        ),
        (lambda: load_adapters(adapted(), build().state_dict()), "there are no adapters to load"),
    ],
)
def test_mistakes_are_named_in_one_line(mistake, message):
    with pytest.raises(ValueError, match=message) as error:
        mistake()
    assert "\n" not in str(error.value)


def test_a_refused_model_is_unchanged():
    model = resnet()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="ModifiedResNet"):
        add_adapters(model)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    add_adapters(model, towers=("text",))
    assert any(p.requires_grad for p in model.transformer.parameters())
    for kind in ("openai", "siglip"):
        model = build(kind)
        with pytest.raises(ValueError, match="another model"):
            load_adapters(model, adapted("coca").state_dict())
        assert not adapter_parameters(model)
        assert all(p.requires_grad for p in model.parameters())
