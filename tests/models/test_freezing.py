"""Frozen parts of towers of every kind, and BatchNorm layers that stay as they are."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from torch import nn

from tracer.errors import UserError
from tracer.models.freezing import freeze, lock_batchnorm, locked_buffers, trained_batchnorm

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 3}
VIT = {"image_size": 32, "layers": 4, "width": 16, "head_width": 8, "patch_size": 16}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TIMM = {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}


def model(vision=VIT, custom: bool = False) -> nn.Module:
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return kind(embed_dim=16, vision_cfg=dict(vision), text_cfg=dict(TEXT))


def trained(net: nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if p.requires_grad}


def blocks(names: set[str], prefix: str) -> set[int]:
    return {int(n.removeprefix(prefix).split(".")[0]) for n in names if n.startswith(prefix)}


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("image", [0, 1, 4])
@pytest.mark.parametrize("text", [0, 2, 3])
def test_the_lowest_blocks_are_frozen_with_what_comes_before_them(custom, image, text):
    net = model(custom=custom)
    freeze(net, image_blocks=image, text_blocks=text)
    left, prefix = trained(net), "text." if custom else ""
    assert blocks(left, "visual.transformer.resblocks.") == set(range(image, 4))
    assert blocks(left, f"{prefix}transformer.resblocks.") == set(range(text, 3))
    before = {"visual.conv1.weight", "visual.class_embedding", "visual.positional_embedding"}
    assert before <= left if not image else not before & left
    before = {f"{prefix}token_embedding.weight", f"{prefix}positional_embedding"}
    assert before <= left if not text else not before & left
    after = {"visual.ln_post.weight", "visual.proj", f"{prefix}ln_final.weight", f"{prefix}text_projection"}
    assert after | {"logit_scale"} <= left


def test_the_blocks_of_resnets_and_of_timms_towers():
    net = model(RESNET)
    freeze(net, image_blocks=2)
    assert {n.split(".")[1] for n in trained(net) if n.startswith("visual.")} == {
        "layer3",
        "layer4",
        "attnpool",
    }
    net = model(TIMM, custom=True)
    count = len(net.visual.trunk.blocks)
    freeze(net, image_blocks=count - 1)
    left = {n for n in trained(net) if n.startswith("visual.")}
    assert blocks(left, "visual.trunk.blocks.") == {count - 1}
    assert {n.split(".")[2] for n in left if n.startswith("visual.trunk.")} == {"blocks", "norm"}
    assert "visual.head.proj.weight" in left
    with pytest.raises(UserError, match=f"is {count + 1}: the image tower has {count} blocks"):
        freeze(net, image_blocks=count + 1)


@pytest.mark.parametrize(("vision", "custom"), [(VIT, False), (VIT, True), (RESNET, False), (TIMM, True)])
def test_a_whole_tower_and_all_but_the_projections(vision, custom):
    net = model(vision, custom)
    freeze(net, "image")
    assert trained(net) == {n for n, _ in net.named_parameters() if not n.startswith("visual.")}
    net = model(vision, custom)
    freeze(net, "text")
    assert trained(net) == {
        n for n, _ in net.named_parameters() if n.startswith("visual.") or n == "logit_scale"
    }
    net = model(vision, custom)
    freeze(net, "all_but_projections")
    left = trained(net) - {"logit_scale"}
    assert {n.removeprefix("text.") for n in left if not n.startswith("visual.")} == {"text_projection"}
    last = {"proj", "attnpool.c_proj.weight", "attnpool.c_proj.bias", "head.proj.weight"}
    image = {n.removeprefix("visual.") for n in left if n.startswith("visual.")}
    assert image
    assert image <= last


def test_a_tower_without_a_projection_or_blocks_is_named():
    net = model(TIMM | {"timm_proj": "none"}, custom=True)
    with pytest.raises(UserError, match="the image tower of this model has no linear projection"):
        freeze(net, "all_but_projections")
    assert all(p.requires_grad for p in net.parameters())
    net = model()
    net.transformer = nn.Linear(2, 2)
    with pytest.raises(
        UserError, match="the blocks of this model's text tower are not known: freeze it as a"
    ):
        freeze(net, text_blocks=1)


def test_batchnorm_of_a_frozen_part_is_locked_by_itself():
    net = model(RESNET)
    freeze(net, image_blocks=2)
    lock_batchnorm(net, all_layers=False)
    assert trained_batchnorm(net) == "visual.layer3.0.bn1"
    before = copy.deepcopy(net.state_dict())
    net.train()
    net.encode_image(torch.randn(2, 3, 32, 32))
    moved = {n for n, value in net.state_dict().items() if not torch.equal(value, before[n])}
    assert moved
    assert {n.split(".")[1] for n in moved} == {"layer3", "layer4"}
    assert {n.rpartition(".")[2] for n in moved} == {"running_mean", "running_var", "num_batches_tracked"}
    assert not moved & set(locked_buffers(net))
    lock_batchnorm(net, all_layers=True)
    assert trained_batchnorm(net) is None
    assert net.state_dict().keys() == before.keys()
    before = copy.deepcopy(net.state_dict())
    other = copy.deepcopy(net).train()
    other.encode_image(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(torch.equal(value, before[n]) for n, value in other.state_dict().items())
    assert other.visual.layer3[0].bn1.weight.grad is not None  # its gain still trains
    assert other.visual.bn1.weight.grad is None
