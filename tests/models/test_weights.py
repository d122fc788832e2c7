"""Checkpoints that plain open_clip reads."""

from __future__ import annotations

import errno
import math
import warnings

import open_clip
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from tracer.errors import UserError
from tracer.models.clip import load_clip
from tracer.models.weights import save_weights


def test_saved_weights_load_in_plain_open_clip(tiny_config, tmp_path):
    state = load_clip(str(tiny_config), None).model.state_dict()
    save_weights(state, tmp_path / "w.safetensors")
    model = open_clip.create_model("tiny-clip", pretrained=str(tmp_path / "w.safetensors"))
    assert torch.equal(model.visual.proj, state["visual.proj"])
    assert torch.equal(model.text_projection, state["text_projection"])


def test_the_logit_scale_is_saved_with_its_bound(tmp_path):
    for value, expected in ((math.log(100) + 1, math.log(100)), (2.0, 2.0)):
        state = {"logit_scale": torch.tensor([value])}
        save_weights(state, tmp_path / "w.safetensors")
        saved = load_file(tmp_path / "w.safetensors")["logit_scale"]
        torch.testing.assert_close(saved, torch.tensor([expected]), rtol=0, atol=1e-6)
        assert state["logit_scale"].item() == pytest.approx(value)  # the model's own tensor stays


def test_views_and_shared_tensors_are_saved_whole(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    save_weights({"a": base.T, "b": base, "c": base[1:]}, tmp_path / "w.safetensors", {"model": "tiny"})
    saved = load_file(tmp_path / "w.safetensors")
    assert torch.equal(saved["a"], base.T)
    assert torch.equal(saved["b"], base)
    assert torch.equal(saved["c"], base[1:])
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"model": "tiny"}


@pytest.mark.parametrize(
    ("text", "number"),
    [("I/O error: No space left on device (os error 28)", errno.ENOSPC), ("unknown", errno.EIO)],
)
def test_a_write_that_fails_is_an_error_of_the_system(monkeypatch, tmp_path, text, number):
    def fail(*_args):
        raise SafetensorError(text)

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match=r"w\.safetensors") as caught:
        save_weights({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    assert caught.value.errno == number
    assert not list(tmp_path.iterdir())


def test_an_empty_file_is_refused(tiny_config, tmp_path):
    (tmp_path / "w.pt").touch()
    with pytest.raises(UserError, match=r"w\.pt' is empty: copy it again"):
        load_clip(str(tiny_config), str(tmp_path / "w.pt"))


def test_a_logit_bias_is_refused_where_the_model_has_none(tiny_config, tmp_path):
    state = load_clip(str(tiny_config), None).model.state_dict()
    torch.save(state | {"logit_bias": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"holds 'logit_bias', .* tiny-clip has no such weight"):
        load_clip(str(tiny_config), str(tmp_path / "w.pt"))


def test_a_warning_is_shown_once_for_all_callers(tiny_config, tmp_path):
    state = load_clip(str(tiny_config), None).model.state_dict()
    state["positional_embedding"] = state["positional_embedding"].repeat(2, 1)
    torch.save(state, tmp_path / "w.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("default")
        load_clip(str(tiny_config), str(tmp_path / "w.pt"))
        load_clip(str(tiny_config), str(tmp_path / "w.pt"))
    ours = [w for w in caught if "w.pt" in str(w.message)]
    assert len(ours) == len({str(w.message) for w in ours}) > 0
    assert all(w.filename.endswith("clip.py") for w in ours)
