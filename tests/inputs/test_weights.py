"""Files of weights, and what must become of each when a user gives it to ``tracer evaluate`` or ``finetune``."""

from __future__ import annotations

import copy
import json
import math
import shutil
import warnings

import open_clip
import pytest
import torch
from conftest import TINY
from open_clip import pretrained as tags
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tracer.cli import main
from tracer.errors import UserError
from tracer.models.architecture import Architecture
from tracer.models.clip import load_clip
from tracer.models.picture_format import PictureFormat
from tracer.models.weights import save_weights
from tracer.train.config import Config
from tracer.train.identity import fingerprint
from tracer.train.run import finetune

FORMAT = {
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "interpolation": "bilinear",
    "resize_mode": "squash",
}


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Random weights of the tiny model."""
    torch.manual_seed(0)
    return open_clip.CLIP(**copy.deepcopy(TINY), nonscalar_logit_scale=True).state_dict()


@pytest.fixture
def evaluate(drawings, tmp_path, capsys):
    """Run ``tracer evaluate`` and return its exit code, what it says on stderr, and the scores."""

    def run(model, pretrained, *options):
        output = tmp_path / "scores.json"
        output.unlink(missing_ok=True)
        files = ("--eval_data.a", drawings / "test.csv", "--cache", tmp_path / "cache", "--output", output)
        argv = ["evaluate", "--model", model, "--pretrained", pretrained, *files, *options]
        code = main([str(a) for a in argv])
        scores = json.loads(output.read_text()) if output.exists() else None
        return code, capsys.readouterr().err, scores

    return run


@pytest.fixture
def tagged(state, tmp_path, monkeypatch):
    """A tag, trained with QuickGELU on pictures of a format of its own, of a model of open_clip with GELU."""
    for name, activation in (("pico", {}), ("pico-quickgelu", {"quick_gelu": True})):
        (tmp_path / f"{name}.json").write_text(json.dumps(TINY | activation))
        open_clip.add_model_config(tmp_path / f"{name}.json")
        save_file(state, tmp_path / "tag.safetensors")
        tag = {"file": str(tmp_path / "tag.safetensors"), "quick_gelu": True, **FORMAT}
        monkeypatch.setitem(tags._PRETRAINED, name, {"own": tag})
    return "pico", "own"


def refused(result) -> str:
    code, err, scores = result
    line = err.strip().splitlines()[-1]
    assert code == 2
    assert scores is None
    assert line.startswith("tracer: error: ")
    assert "Traceback" not in err
    return line


# --- the activation and the picture format


@pytest.mark.filterwarnings("ignore:.*were trained with QuickGELU")
@pytest.mark.parametrize(("model", "tag"), open_clip.list_pretrained())
def test_every_tag_gets_its_own_activation_and_format(model, tag, monkeypatch):
    """Up to the moment at which open_clip would build the model and download its weights."""
    built = []

    def stop(name, pretrained, **_):
        built.append((name, pretrained))
        raise RuntimeError("stop")

    monkeypatch.setattr(open_clip, "create_model", stop)
    with pytest.raises(UserError, match="stop"):
        load_clip(model, tag)
    ((name, pretrained),) = built
    wanted = open_clip.get_pretrained_cfg(model, tag)
    config = open_clip.get_model_config(name)
    assert config.get("quick_gelu", False) == wanted.get("quick_gelu", config.get("quick_gelu", False))
    assert open_clip.get_pretrained_cfg(name, pretrained) == wanted
    plain = open_clip.get_model_config(model)
    assert {**plain, "quick_gelu": 0} == {**config, "quick_gelu": 0}


def test_a_tag_brings_its_activation_and_its_pictures(tagged, evaluate):
    code, err, scores = evaluate(*tagged)
    assert code == 0
    assert "'own' were trained with QuickGELU: building pico-quickgelu in place of pico" in err
    clip = load_clip(*tagged)
    assert type(clip.model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert clip.picture_format == PictureFormat(32, **FORMAT)
    assert scores == evaluate("pico-quickgelu", "own")[2]


def test_a_run_s_weights_describe_themselves(tagged, evaluate, drawings, tmp_path):
    options = {"train_data": drawings / "train.csv", "output": tmp_path / "run", "cache": tmp_path / "cache"}
    finetune(Config(model=tagged[0], pretrained=tagged[1], steps=1, batch_size=8, warmup=0, **options))
    for name in ("student", "teacher"):
        path = tmp_path / "run" / f"{name}.safetensors"
        with safe_open(path, "pt") as file:
            described = file.metadata()
        assert (described["model"], described["activation"]) == ("pico-quickgelu", "quick_gelu")
        assert json.loads(described["preprocess_cfg"]) == {"size": 32} | json.loads(json.dumps(FORMAT))
        assert json.loads(described["model_cfg"]) == TINY | {"quick_gelu": True}
        clip = load_clip("pico-quickgelu", str(path))
        assert clip.picture_format == PictureFormat(32, **FORMAT)
        line = refused(evaluate("pico", path))
        assert "holds weights of pico-quickgelu, not of pico (quick_gelu is True in the file" in line
        assert line.endswith("give --model the config (.json) of pico-quickgelu")
        assert evaluate("pico-quickgelu", path)[:2] == (0, "")
        assert load_file(path).keys() == clip.model.state_dict().keys()


@pytest.mark.parametrize(
    "change",
    [
        {"vision_cfg": TINY["vision_cfg"] | {"image_size": 40}},
        {"vision_cfg": TINY["vision_cfg"] | {"head_width": 32}},  # the same shapes, other heads
        {"text_cfg": TINY["text_cfg"] | {"no_causal_mask": True}},
        {"text_cfg": TINY["text_cfg"] | {"heads": 4}},
        {"vision_cfg": TINY["vision_cfg"] | {"pool_type": "avg"}},
        {"quick_gelu": True},
    ],
)
def test_weights_of_another_architecture_are_refused(change, evaluate, tiny_config, state, tmp_path):
    file = tmp_path / "student.safetensors"
    save_weights(state, file, load_clip(str(tiny_config), None).architecture.metadata())
    (tmp_path / "other.json").write_text(json.dumps(TINY | change))
    line = refused(evaluate(tmp_path / "other.json", file))
    assert "holds weights of tiny-clip, not of other (" in line
    assert line.endswith("give --model the config (.json) of tiny-clip")
    refused(evaluate("tracer-demo", file))
    # What only matters in training may differ.
    dropping = TINY | {"vision_cfg": TINY["vision_cfg"] | {"patch_dropout": 0.5}}
    (tmp_path / "other.json").write_text(json.dumps(dropping))
    assert evaluate(tmp_path / "other.json", file)[0] == 0


def test_what_a_foreign_file_does_not_say_is_warned_about(tagged, evaluate, tmp_path):
    code, err, _ = evaluate("pico", tmp_path / "tag.safetensors")
    assert code == 0
    assert (
        "does not say with which activation it was trained, and pico has GELU: for weights with QuickGELU"
        in err
    )
    assert "give --model pico-quickgelu" in err
    assert "taking those of the tags of pico (mean (0.0, 0.0, 0.0)" in err
    assert load_clip("pico", str(tmp_path / "tag.safetensors")).picture_format == PictureFormat(32, **FORMAT)


def test_resized_positions_are_warned_about(evaluate, state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    (tmp_path / "larger.json").write_text(
        json.dumps(TINY | {"vision_cfg": TINY["vision_cfg"] | {"image_size": 40}})
    )
    code, err, _ = evaluate(tmp_path / "larger.json", tmp_path / "w.safetensors")
    assert code == 0
    assert "'visual.positional_embedding' was resized from [17, 32] to [26, 32]" in err


@pytest.mark.parametrize(
    ("inside", "asked", "difference"),
    [
        ("ViT-B-16-quickgelu", "ViT-B-16", "quick_gelu is True in the file and False in the model"),
        ("ViT-B-16", "ViT-B-16-quickgelu", "quick_gelu is False in the file"),
        ("ViT-B-16", "ViT-B-32", "patch_size is 16 in the file"),
        ("ViT-L-14", "ViT-L-14-336", "image_size is 224 in the file"),
        ("ViT-B-16", "tracer-demo", "embed_dim is 512 in the file"),
    ],
)
def test_the_model_that_fits_is_named(inside, asked, difference, state, evaluate, tmp_path):
    config = open_clip.get_model_config(inside)
    save_weights(
        state,
        tmp_path / "w.safetensors",
        Architecture(inside, config, PictureFormat(224, **FORMAT)).metadata(),
    )
    line = refused(evaluate(asked, tmp_path / "w.safetensors"))
    assert f"holds weights of {inside}, not of {asked}" in line
    assert difference in line
    assert line.endswith(f"give --model {inside}")


# --- what else is in the file


def wrapped(state, *parts):
    return {"".join(parts) + name: value for name, value in state.items()}


PLAIN = {
    "state dict": lambda s: s,
    "checkpoint": lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"lr": 1.0}},
    "compiled": lambda s: wrapped(s, "_orig_mod."),
    "parallel": lambda s: wrapped(s, "module."),
    "both": lambda s: {"state_dict": wrapped(s, "module.", "_orig_mod.")},
    "both, the other way": lambda s: wrapped(s, "_orig_mod.", "module."),
    "one compiled tower": lambda s: {n.replace("visual.", "visual._orig_mod."): v for n, v in s.items()},
    "under 'model'": lambda s: {"model": s, "args": {"lr": 1.0}},
    "of an average": lambda s: wrapped(s, "module.") | {"n_averaged": torch.tensor(5)},
    "of Lightning": lambda s: {"state_dict": wrapped(s, "model."), "epoch": 1},
    "half precision": lambda s: {n: v.bfloat16() for n, v in s.items()},
    "a scalar scale": lambda s: s | {"logit_scale": s["logit_scale"].squeeze()},
}


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("content", PLAIN)
def test_weights_are_found_whatever_wraps_them(content, suffix, state, tiny_config, tmp_path):
    """Also where the suffix is wrong: all these files are of torch.save."""
    path = tmp_path / f"w{suffix}"
    torch.save(PLAIN[content](state), path)
    loaded = load_clip(str(tiny_config), str(path)).model.state_dict()
    expected = {n: v.bfloat16().float() for n, v in state.items()} if content == "half precision" else state
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@pytest.mark.parametrize("content", PLAIN)
def test_the_demo_s_model_reads_the_same_files(content, tmp_path):
    state = load_clip("tracer-demo", None).model.state_dict()
    torch.save(PLAIN[content](state), tmp_path / "w.pt")
    loaded = load_clip("tracer-demo", str(tmp_path / "w.pt")).model.state_dict()
    for name, value in state.items():
        expected = value.bfloat16().float() if content == "half precision" else value
        assert torch.equal(loaded[name], expected)


def test_safetensors_under_another_suffix(state, tiny_config, tmp_path):
    save_file(wrapped(state, "module."), tmp_path / "w.pt")
    loaded = load_clip(str(tiny_config), str(tmp_path / "w.pt")).model.state_dict()
    assert torch.equal(loaded["visual.proj"], state["visual.proj"])


class Payload:
    """Makes a file when it is unpickled, as any code could run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def torch_script(path, _state):
    with torch.no_grad():
        torch.jit.save(torch.jit.script(torch.nn.Identity()), path)


BROKEN = {
    "an empty file": (lambda p, s: p.touch(), "is empty: copy it again"),
    "text": (lambda p, s: p.write_text("<html>404</html>"), "is not a file of weights"),
    "a pointer": (lambda p, s: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "TorchScript": (torch_script, "is a TorchScript archive, which holds a program: write its weights alone"),
    "objects": (
        lambda p, s: torch.save({"state_dict": s, "x": Payload(p.with_name("ran"))}, p),
        "beside tensors",
    ),
    "a module": (lambda p, s: torch.save(torch.nn.Linear(2, 2), p), "beside tensors"),
    "a tensor": (lambda p, s: torch.save(torch.zeros(2), p), "not a state dict"),
    "numbers": (lambda p, s: torch.save({"loss": 1.0}, p), "is not a state dict: it holds loss"),
    "half a file": (
        lambda p, s: (torch.save(s, p), p.write_bytes(p.read_bytes()[:5000])),
        "not a complete file",
    ),
    "half a safetensors file": (
        lambda p, s: (save_file(s, p), p.write_bytes(p.read_bytes()[:5000])),
        "not a complete safetensors file",
    ),
    "twice": (
        lambda p, s: torch.save(s | wrapped(s, "_orig_mod."), p),
        "holds the same weights with and without a wrapper",
    ),
    "a folder": (lambda p, s: p.mkdir(), "is not the folder of a run (it holds no student.safetensors)"),
    "another model": (lambda p, s: save_file({"a": torch.zeros(2)}, p), "cannot be loaded"),
}


@pytest.mark.parametrize("model", ["tiny", "tracer-demo"])
@pytest.mark.parametrize("content", BROKEN)
def test_other_files_are_refused_by_name(content, model, state, tiny_config, evaluate, tmp_path):
    write, says = BROKEN[content]
    path = tmp_path / "w.pt"
    write(path, state)
    line = refused(evaluate(tiny_config if model == "tiny" else model, path))
    assert str(path) in line
    assert says in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["visual.proj", "logit_scale", "positional_embedding"])
def test_weights_that_are_not_finite_are_refused(name, value, state, tiny_config, evaluate, tmp_path):
    broken = {key: tensor.clone() for key, tensor in state.items()}
    broken[name].view(-1)[0] = value
    save_file(broken, tmp_path / "w.safetensors")
    line = refused(evaluate(tiny_config, tmp_path / "w.safetensors"))
    assert f"are not finite: '{name}' holds 1 NaN or infinite value of" in line
    assert "w.safetensors" in line


# --- models that come with their weights


@pytest.fixture
def folder(state, tmp_path):
    """A model in a folder, as open_clip pushes it to a hub."""
    path = tmp_path / "M"
    path.mkdir()
    described = {"model_cfg": TINY | {"quick_gelu": True}, "preprocess_cfg": {"size": 32, **FORMAT}}
    (path / "open_clip_config.json").write_text(json.dumps(described))
    save_file(state, path / "open_clip_model.safetensors")
    return path


def test_no_weights_are_dropped_beside_a_folder_s_own(folder, state, evaluate, tmp_path):
    save_file(state, tmp_path / "x.safetensors")
    for given in (tmp_path / "x.safetensors", "openai"):
        for name in (f"local-dir:{folder}", "hf-hub:laion/none"):
            line = refused(evaluate(name, given))
            assert (
                f"--model {name} comes with its own weights, so --pretrained {given} would be ignored" in line
            )
            assert "give --pretrained null" in line
    assert evaluate(f"local-dir:{folder}", "null")[:2] == (0, "")
    clip = load_clip(f"local-dir:{folder}", None)
    assert clip.picture_format == PictureFormat(32, **FORMAT)
    assert clip.architecture.metadata()["activation"] == "quick_gelu"


def test_a_folder_without_weights_is_refused(folder, evaluate):
    (folder / "open_clip_model.safetensors").unlink()
    assert "holds no weights" in refused(evaluate(f"local-dir:{folder}", "null"))
    (folder / "open_clip_config.json").unlink()
    assert "holds no open_clip_config.json" in refused(evaluate(f"local-dir:{folder}", "null"))


def test_the_fingerprint_of_a_run_holds_what_lies_in_the_folder(folder, state, drawings):
    config = Config(train_data=drawings / "train.csv", model=f"local-dir:{folder}", pretrained=None)
    seen = {fingerprint(config)}
    assert fingerprint(config) in seen
    save_file({n: v + 1 for n, v in state.items()}, folder / "open_clip_model.safetensors")
    seen.add(fingerprint(config))
    shutil.copy(folder / "open_clip_model.safetensors", folder / "tokenizer.json")
    seen.add(fingerprint(config))
    described = json.loads((folder / "open_clip_config.json").read_text())
    described["model_cfg"]["quick_gelu"] = False
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    seen.add(fingerprint(config))
    assert len(seen) == 4


def test_the_fingerprint_of_a_run_holds_the_model_config(tiny_config, drawings, tmp_path):
    path = tmp_path / "mine.json"
    config = Config(train_data=drawings / "train.csv", model=str(path), pretrained=None)
    seen = set()
    for change in ({}, {"quick_gelu": True}):
        path.write_text(json.dumps(TINY | change))
        seen.add(fingerprint(config))
    assert len(seen) == 2


# --- the warnings of libraries


def test_warnings_of_libraries_are_shown(evaluate, tiny_config, monkeypatch, caplog):
    original = open_clip.create_model

    def warn(*args, **kwargs):
        exec(
            compile("warnings.warn('a mismatch\\nof something')", "open_clip/factory.py", "exec"),
            {"warnings": warnings, "__name__": "open_clip.factory"},
        )
        return original(*args, **kwargs)

    monkeypatch.setattr(open_clip, "create_model", warn)
    code, err, _ = evaluate(tiny_config, "null")
    assert code == 0
    assert "tracer: warning: a mismatch of something\n" in err
    assert "Model initialized randomly" in caplog.text
