"""Towers that compute their activations again, and compiled ones."""

from __future__ import annotations

import open_clip
import pytest
import torch

from tracer.adapters import add_adapters
from tracer.models.towers import checkpoint_activations, compile_towers

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
