"""R-Adapter: folding adapters into the layers before them, and the adapters' own file."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from adapter_models import CONFIGS, KINDS, adapted, adapter_parameters, build, features, randomise
from safetensors import SafetensorError

from tracer.adapters import add_adapters, fold, load_adapters, read_adapters, save_adapters
from tracer.models.weights import save_weights


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_folded_equals_the_adapted_model_with_scaled_adapters(kind, rank):
    plain = build(kind)
    model = copy.deepcopy(plain)
    add_adapters(model, rank=rank)
    randomise(model)
    start = features(plain)
    state = model.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    for alpha in (0.0, 0.37, 1.0):  # a sweep: one model, one state
        plain.load_state_dict(fold(state, alpha))
        adapted = copy.deepcopy(model)
        for name, parameter in adapter_parameters(adapted).items():
            parameter.data.mul_(1.0 if name.endswith("down") else alpha)
        with torch.no_grad():
            folded, scaled = features(plain), features(adapted)
        for a, b, c in zip(folded, scaled, start, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
            assert torch.allclose(a, c, atol=1e-3) == (alpha == 0)  # the adapters do matter
    assert all(torch.equal(state[name], value) for name, value in kept.items())


def test_alpha_0_is_the_pretrained_model_and_untouched_tensors_are_not_copied():
    model = build()
    pretrained = {name: value.clone() for name, value in model.state_dict().items()}
    add_adapters(model)
    randomise(model)
    state = model.state_dict()
    folded = fold(state, 0.0)
    assert folded.keys() == pretrained.keys()
    assert all(torch.equal(folded[name], value) for name, value in pretrained.items())
    assert folded["token_embedding.weight"] is state["token_embedding.weight"]


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_folded_checkpoint_is_an_ordinary_open_clip_checkpoint(kind, tmp_path):
    model = build(kind)
    add_adapters(model)
    randomise(model)
    save_weights(fold(model.state_dict(), 0.5), tmp_path / "plain.safetensors")
    plain = open_clip.create_model(
        f"adapters_{kind}", pretrained=str(tmp_path / "plain.safetensors"), nonscalar_logit_scale=True
    )
    for parameter in adapter_parameters(model).values():
        parameter.data.mul_(0.5)
    for a, b in zip(features(plain.eval()), features(model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_low_precision_weights_keep_their_dtype():
    model = build().bfloat16()
    add_adapters(model)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.bfloat16}
    randomise(model)
    assert {v.dtype for v in fold(model.state_dict(), 0.5).values()} == {torch.bfloat16}


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("towers", [("visual", "text"), ("text",)])
@pytest.mark.parametrize("kind", ["openai", "siglip"])
def test_adapters_travel_in_a_small_file_of_their_own(kind, towers, rank, tmp_path):
    pretrained = build(kind)
    model = copy.deepcopy(pretrained)
    share = add_adapters(model, rank=rank, towers=towers)
    randomise(model)
    file = tmp_path / "adapters.safetensors"
    save_adapters(model.state_dict(), file, kind)
    assert file.stat().st_size < 4 * share.adapters + 8000  # the names of the tensors

    resumed = copy.deepcopy(pretrained)
    load_adapters(resumed, read_adapters(file, kind))  # adds them
    again = copy.deepcopy(pretrained)
    add_adapters(again, rank=rank, towers=towers)
    load_adapters(again, read_adapters(file, kind))  # finds them there
    assert {n for n, p in resumed.named_parameters() if p.requires_grad} == adapter_parameters(model).keys()
    for other in (resumed, again):
        assert all(torch.equal(a, b) for a, b in zip(features(other), features(model), strict=True))
    folded = fold(pretrained.state_dict() | read_adapters(file, kind), 0.5)  # without any adapted model
    assert all(torch.equal(folded[name], value) for name, value in fold(model.state_dict(), 0.5).items())


def test_a_file_of_adapters_names_its_architecture(tmp_path):
    """ViT-B-32's would fit into ViT-B-16: their layers have the same shapes."""
    file = tmp_path / "adapters.safetensors"
    save_adapters(adapted().state_dict(), file, "ViT-B-32")
    with pytest.raises(ValueError, match="belong to ViT-B-32, not to ViT-B-16"):
        read_adapters(file, "ViT-B-16")
    with pytest.raises(ValueError, match=r"none\.safetensors' does not exist"):
        read_adapters(tmp_path / "none.safetensors", "ViT-B-16")
    save_weights(build().state_dict(), tmp_path / "student.safetensors")
    with pytest.raises(
        ValueError, match=r"student\.safetensors' holds no adapters: give a run's adapters\.safe"
    ):
        read_adapters(tmp_path / "student.safetensors", "ViT-B-16")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        ValueError, match=r"adapters\.safetensors' is not a complete safetensors file"
    ) as error:
        read_adapters(file, "ViT-B-32")
    assert "\n" not in str(error.value)


def test_a_full_disk_is_an_error_of_the_operating_system(tmp_path, monkeypatch):
    def full_disk(*_args, **_kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left") as error:
        save_adapters(adapted().state_dict(), tmp_path / "adapters.safetensors", "openai")
    assert error.value.errno == 28
    assert not list(tmp_path.iterdir())
