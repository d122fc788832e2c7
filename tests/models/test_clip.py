"""Loading models by every kind of name, their picture formats, and encoding."""

from __future__ import annotations

import math
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

from tracer.errors import UserError
from tracer.models.clip import encode, load_clip, projections, weights_file
from tracer.models.picture_format import PictureFormat
from tracer.models.registry import _MODELS, register_model
from tracer.models.weights import save_weights


@pytest.fixture
def clip(tiny_config):
    torch.manual_seed(0)
    return load_clip(str(tiny_config), None)


@pytest.fixture
def batch():
    return torch.rand(3, 3, 32, 32), torch.randint(1, 99, (3, 16))


def test_a_model_config_is_loaded_with_a_checkpoint(clip, tiny_config, tmp_path):
    save_weights(clip.model.state_dict(), tmp_path / "w.safetensors")
    loaded = load_clip(str(tiny_config), str(tmp_path / "w.safetensors"))
    assert loaded.name == "tiny-clip"
    assert loaded.tokenizer(["a", "b c"]).shape == (2, 16)
    for name, value in clip.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)


def with_format(monkeypatch, **fields) -> str:
    """Register a model whose pictures have this format in open_clip's own words; return its name."""
    monkeypatch.setattr("tracer.models.registry._MODELS", dict(_MODELS))
    model = nn.Module()
    model.visual = nn.Module()
    model.visual.preprocess_cfg = fields
    register_model(
        "formatted", lambda _: model, lambda: lambda texts: torch.zeros(len(texts), 1), Path("none")
    )
    return "formatted"


def test_the_picture_format_is_that_of_the_model(clip, monkeypatch):
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    assert clip.picture_format == PictureFormat(32, tuple(mean), tuple(std), "bicubic", "shortest")
    fields = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    name = with_format(monkeypatch, size=(24, 24), **fields)
    expected = PictureFormat(24, (0.5,) * 3, (0.25,) * 3, "bilinear", "squash")
    assert load_clip(name, None).picture_format == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"size": (32, 64)},
        {"size": 32, "resize_mode": "longest"},
        {"size": 32, "interpolation": "nearest"},
    ],
)
def test_a_picture_format_that_is_not_supported_is_refused(monkeypatch, fields):
    with pytest.raises(
        UserError, match=r"'formatted' wants pictures of 32×.*: only square ones, shortest or"
    ):
        load_clip(with_format(monkeypatch, **fields), None)


def test_unknown_names_are_refused_with_those_that_exist(tmp_path):
    with pytest.raises(UserError, match=r"unknown model 'ViT-B-61': use an open_clip name \(such as ViT-B-"):
        load_clip("ViT-B-61", None)
    with pytest.raises(UserError, match=r"'opnai' is neither a local file nor a pretrained tag .*openai"):
        load_clip("ViT-B-16", "opnai")
    with pytest.raises(UserError, match=r"checkpoint '.*nope.pt' does not exist: check --pretrained"):
        load_clip("ViT-B-16", str(tmp_path / "nope.pt"))


def test_weights_of_another_shape_are_refused_in_one_line(tiny_config, tmp_path):
    save_weights({"visual.proj": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"'tiny-clip' with weights '.*' cannot be loaded") as caught:
        load_clip(str(tiny_config), str(tmp_path / "w.safetensors"))
    assert "\n" not in str(caught.value)


def test_a_registered_model_is_loaded_by_its_name(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("tracer.models.registry._MODELS", dict(_MODELS))
    asked = []

    def load(path):
        asked.append(path)
        return clip.model

    own, other = tmp_path / "own.safetensors", tmp_path / "other.safetensors"
    other.touch()
    register_model("mine", load, lambda: clip.tokenizer, own)
    loaded = load_clip("mine", None)
    assert (loaded.name, loaded.picture_format) == ("mine", clip.picture_format)
    load_clip("mine", str(other))
    assert asked == [None, other]
    assert weights_file("mine", None) == own
    assert weights_file("mine", str(other)) == other
    assert weights_file("ViT-B-16", "openai") is None
    with pytest.raises(UserError, match="mine has no pretrained tags, and 'openai' is not a local file"):
        load_clip("mine", "openai")
    with pytest.raises(UserError, match=r"unknown model 'your': use an open_clip name .*, mine, "):
        load_clip("your", None)


def test_features_are_normalised_and_in_float32(clip, batch):
    features = encode(clip.model.bfloat16(), batch[0].bfloat16(), batch[1])
    assert {value.dtype for value in features} == {torch.float32}
    assert features.image.shape == features.text.shape == (3, 32)
    assert features.logit_scale.shape == ()
    for side in (features.image, features.text):
        torch.testing.assert_close(side.norm(dim=1), torch.ones(3))
    assert features.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-2)


def test_a_dictionary_of_outputs_is_the_same_as_a_tuple(clip, batch):
    expected = encode(clip.model, *batch)
    clip.model.output_dict = True
    for got, value in zip(encode(clip.model, *batch), expected, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize(("log_scale", "sigma"), [(math.log(100) + 1, 100.0), (2.0, math.exp(2))])
def test_the_logit_scale_is_bounded_and_keeps_its_gradient(clip, batch, log_scale, sigma):
    parameter = clip.model.logit_scale
    nn.init.constant_(parameter, log_scale)
    scale = encode(clip.model, *batch).logit_scale
    assert scale.item() == pytest.approx(sigma)
    scale.backward()
    assert parameter.grad.item() == pytest.approx(math.exp(log_scale))


def test_projections_map_the_towers_into_the_shared_space(clip):
    visual, text = projections(clip.model)
    assert visual.shape == text.shape == (32, 32)
    assert visual is clip.model.visual.proj
    assert text is clip.model.text_projection
    clip.model.text_projection = nn.Parameter(torch.zeros(8, 32))
    assert projections(clip.model)[1].shape == (8, 32)
    clip.model.visual.proj = None
    assert projections(clip.model) is None


def test_the_projection_of_a_linear_layer_is_its_transpose():
    model = nn.Module()
    model.visual, model.text = nn.Module(), nn.Module()
    model.visual.proj, model.text.text_projection = nn.Linear(6, 4), nn.Linear(5, 4)
    visual, text = projections(model)
    assert torch.equal(visual, model.visual.proj.weight.T)
    assert text.shape == (5, 4)
