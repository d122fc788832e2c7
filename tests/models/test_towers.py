"""Towers that compute their activations again, and compiled ones."""

from __future__ import annotations

import copy
from functools import partial

import open_clip
import pytest
import torch
from adapter_models import build, inputs

from tracer.adapters import add_adapters
from tracer.models.towers import checkpoint_activations, compile_towers, encode_text_first

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16}


def gradients(change, custom: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Return the gradients of adapters that are dropped at random, and how often the blocks have run."""
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = kind(embed_dim=16, vision_cfg=dict(VIT), text_cfg=dict(TEXT))
    add_adapters(model, drop=0.5)
    runs = []
    for name, module in model.named_modules():
        if type(module).__name__ == "ResidualAttentionBlock":
            module.ln_1.register_forward_hook(lambda *_, name=name: runs.append(name))
    change(model)
    torch.manual_seed(7)
    image, text, _ = model.train()(torch.randn(4, 3, 32, 32), torch.randint(1, 60, (4, 8)))
    (image * text).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, len(runs)


@pytest.mark.parametrize("custom", [False, True])
def test_activations_that_are_computed_again_give_the_same_gradients(custom):
    """Bit for bit, in adapters that are dropped at random: the second time the same ones are."""
    kept, once = gradients(lambda model: None, custom)
    again, twice = gradients(checkpoint_activations, custom)
    assert (once, twice) == (4, 8)
    assert any(not value.any() for value in kept.values())  # some were dropped
    assert any(value.any() for value in kept.values())
    assert kept.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in kept.items())


def test_a_resnet_says_that_it_keeps_its_activations():
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=dict(TEXT))
    with pytest.warns(UserWarning, match="the image tower is a ResNet, which keeps its activations"):
        checkpoint_activations(model)


@pytest.mark.parametrize("custom", [False, True])
def test_compiled_towers_keep_their_keys_and_gradients(custom):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def compiled(model):
        keys = model.state_dict().keys()
        compile_towers(model, backend="aot_eager")
        assert model.state_dict().keys() == keys

    plain, _ = gradients(lambda model: None, custom)
    fast, _ = gradients(compiled, custom)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["openai", "siglip"])
@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_texts_are_encoded_first_and_nothing_else_changes(kind, dictionary, bias):
    """Output and keys stay what they are; the text features are handed out between the towers."""
    model = build(kind)
    model.output_dict = dictionary
    model.logit_bias = torch.nn.Parameter(torch.tensor([-3.0])) if bias else None
    pictures, tokens = inputs(model)
    keys, want = list(model.state_dict()), model(pictures, tokens)
    assert encode_text_first(model)
    assert encode_text_first(model)  # once more changes nothing
    events: list[object] = []
    text = model.text if kind == "siglip" else model.transformer
    for name, tower in (("text", text), ("image", model.visual)):
        tower.register_forward_hook(lambda *_, name=name: events.append(name))
    got = model(pictures, tokens, with_text=events.append)
    assert events[0] == "text"
    assert events[2] == "image"
    assert list(model.state_dict()) == keys
    assert type(got) is type(want)
    got, want = (list(x.values()) if dictionary else x for x in (got, want))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert events[1] is got[1]
    assert torch.equal(model(pictures)["image_features"] if dictionary else model(pictures)[0], want[0])


def test_a_copy_encodes_with_its_own_weights():
    model = build()
    assert encode_text_first(model)
    pictures, tokens = inputs(model)
    before, other = model(pictures, tokens), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2.0)
    assert all(torch.equal(x, y) for x, y in zip(model(pictures, tokens), before, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(other(pictures, tokens), before, strict=True))


def test_models_with_another_forward_pass_are_left_alone():
    coca = build("coca")
    assert not encode_text_first(coca)
    assert "forward" not in vars(coca)

    class Other(open_clip.CLIP):
        def forward(self, image, text):
            return super().forward(image, text)

    assert not encode_text_first(Other(embed_dim=16, vision_cfg=dict(VIT), text_cfg=dict(TEXT)))
    assert not encode_text_first(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("change", [checkpoint_activations, partial(compile_towers, backend="aot_eager")])
def test_towers_that_run_otherwise_encode_texts_first_too(custom, change):
    torch._dynamo.reset()

    def first(model):
        assert encode_text_first(model)

    def both(model):
        first(model)
        change(model)

    plain, _ = gradients(first, custom)
    other, _ = gradients(both, custom)
    assert plain.keys() == other.keys()
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)
