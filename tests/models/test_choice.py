"""What "auto" and the folder of a run mean, and what is refused before the work."""

from __future__ import annotations

import shutil
import urllib.error

import pytest
import torch

from tracer.errors import UserError
from tracer.evaluation.config import EvaluateConfig
from tracer.evaluation.evaluate import evaluate
from tracer.models import choice
from tracer.models.choice import check_model, choose_model
from tracer.models.clip import load_clip
from tracer.models.weights import save_weights


@pytest.mark.parametrize(
    ("model", "pretrained", "means"),
    [
        ("auto", "auto", ("ViT-B-16-quickgelu", "openai")),
        ("ViT-B-32", "auto", ("ViT-B-32", "openai")),
        ("ViT-B-32", None, ("ViT-B-32", None)),
        ("tracer-demo", "auto", ("tracer-demo", None)),
        ("hf-hub:a/b", "auto", ("hf-hub:a/b", None)),
        ("local-dir:a", "auto", ("local-dir:a", None)),
        ("some/config.json", "auto", ("some/config.json", None)),
        ("auto", "laion2b_s34b_b88k", ("ViT-B-16-quickgelu", "laion2b_s34b_b88k")),
        ("unknown", "auto", ("unknown", "openai")),  # load_clip refuses the name
    ],
)
def test_the_default_weights_depend_on_the_model(model, pretrained, means):
    import tracer.demo.small_clip  # noqa: F401 (registers the demo's model)

    assert choose_model(model, pretrained) == means


def test_a_model_without_the_default_weights_names_those_that_it_has():
    with pytest.raises(UserError, match=r"has no weights 'openai': give --pretrained one of webli, or null"):
        choose_model("ViT-SO400M-14-SigLIP", "auto")


def test_a_model_config_alone_has_random_weights_and_says_so(tiny_config):
    with pytest.warns(UserWarning, match="has random weights: give --pretrained"):
        load_clip(str(tiny_config), "auto")


@pytest.fixture
def run(tiny_config, tmp_path):
    """A folder with the weights of a model whose config lies elsewhere."""
    clip = load_clip(str(tiny_config), None)
    folder = tmp_path / "run"
    folder.mkdir()
    save_weights(clip.model.state_dict(), folder / "student.safetensors", clip.architecture.metadata())
    return folder, clip


@pytest.mark.parametrize("given", ["", "student.safetensors"])
def test_the_weights_of_a_run_name_their_model(run, given):
    folder, clip = run
    loaded = load_clip("auto", str(folder / given))
    assert loaded.name == clip.name
    for name, value in clip.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name


def test_a_run_s_folder_is_evaluated(run, drawings):
    folder, _ = run
    scores = evaluate(EvaluateConfig(eval_data={"a": str(drawings / "test.csv")}, pretrained=str(folder)))
    shutil.move(folder / "student.safetensors", folder / "other.safetensors")
    assert scores["a"]["pictures"] == 16
    with pytest.raises(UserError, match=r"is not the folder of a run \(it holds no student.safetensors\)"):
        evaluate(EvaluateConfig(eval_data={"a": str(drawings / "test.csv")}, pretrained=str(folder)))


def without_network(monkeypatch, error: Exception) -> None:
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(choice.urllib.request, "urlopen", fail)
    monkeypatch.setattr(choice, "try_to_load_from_cache", lambda *_: None)


def test_weights_out_of_reach_are_one_line_before_the_work(monkeypatch):
    without_network(monkeypatch, urllib.error.URLError("no route"))
    with pytest.raises(UserError, match=r"'openai' of ViT-B-16-quickgelu .* \(no route\): connect once"):
        check_model("auto", "auto")
    check_model("tracer-demo", "auto")  # needs no connection
    check_model("ViT-B-32", None)


def test_weights_in_the_cache_and_servers_that_answer_pass(monkeypatch):
    without_network(monkeypatch, urllib.error.HTTPError("", 403, "forbidden", None, None))  # type: ignore[arg-type]
    check_model("auto", "auto")
    without_network(monkeypatch, urllib.error.URLError("no route"))
    monkeypatch.setattr(choice, "try_to_load_from_cache", lambda *_: "a/file")
    check_model("auto", "auto")
