"""The main job end to end in miniature: every method, interpolation, report, and reuse of what is there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from picture_sets import LOADERS
from results_schema import validate
from safetensors.torch import load_file

from tracer.adapters import fold, read_adapters
from tracer.data.build import read_index
from tracer.demo.compare import command_line, demo
from tracer.demo.config import DemoConfig
from tracer.errors import UserError
from tracer.evaluation.prompts import class_prompts
from tracer.evaluation.scores import numbers_alone
from tracer.evaluation.zero_shot import evaluate_zero_shot
from tracer.models.clip import load_clip
from tracer.models.soups import interpolate
from tracer.models.weights import save_weights

VARIANTS = tuple(f"r-adapter-{name}" for name in ("infonce", "no-drop", "no-average", "no-scaling"))


@pytest.fixture(scope="module")
def config(tiny_config, drawings, tmp_path_factory) -> DemoConfig:
    """Two seeds of four steps on the drawn pictures."""
    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    start = folder / "start.safetensors"
    save_weights(load_clip(str(tiny_config), None).model.state_dict(), start)
    return DemoConfig(
        train_data=drawings / "train.csv",
        eval_data={"same": drawings / "test.csv", "other": drawings / "train.csv"},
        model=str(tiny_config),
        pretrained=str(start),
        output=folder / "run",
        cache=folder / "cache",
        precision="fp32",
        seeds=2,
        ablate=True,
        steps=4,
        warmup=1,
        batch_size=16,
        lr=1e-2,
        wise_alpha=0.25,  # not the adapters' α
    )


def test_demo_compares_every_method_and_reuses_finished_runs(config, capsys):
    report = demo(config)
    page = report.read_text()
    results = json.loads((config.output / "results.json").read_text())
    validate(results)
    methods = {method["key"]: method for method in results["methods"]}
    assert list(methods) == ["zero-shot", "flyp", "ema", "wma", "wise-ft", "r-adapter", *VARIANTS]
    for key, method in methods.items():
        assert [run["seed"] for run in method["runs"]] == ([None] if key == "zero-shot" else [0, 1])
        for run in method["runs"]:
            assert set(run["eval"]) == {"same", "other"}
        assert method["name"] in page
    assert [domain["kind"] for domain in results["domains"]] == ["in-distribution", "shifted"]
    for curve in results["curves"]:
        assert [(p["seed"], p["alpha"]) for p in curve["points"]] == [
            (seed, alpha) for seed in (0, 1) for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        assert all(set(p["eval"]) == {"same", "other"} for p in curve["points"])
    assert [curve["key"] for curve in results["curves"]] == ["wise-ft", "r-adapter"]
    # the table's rows are the points at the chosen α
    for key, alpha in (("wise-ft", config.wise_alpha), ("r-adapter", config.adapter_alpha)):
        (points,) = (curve["points"] for curve in results["curves"] if curve["key"] == key)
        chosen = [p["eval"] for p in points if p["alpha"] == alpha]
        assert [numbers_alone(run["eval"]) for run in methods[key]["runs"]] == chosen
    # distillation ran where it should: plain runs have no teacher, the others a gap that opened
    assert methods["flyp"]["runs"][0]["teacher_eval"] is None
    assert methods["flyp"]["runs"][0]["log"][-1]["relational"] == 0
    for key in ("ema", "wma"):
        assert methods[key]["runs"][0]["log"][-1]["relational"] > 1e-5
        assert set(methods[key]["runs"][0]["teacher_eval"]) == {"same", "other"}
    assert len(results["examples"]) == 8
    assert set(results["examples"][0]["predictions"]) == {"zero-shot", "flyp", "ema", "wma", "r-adapter"}
    assert "FLYP" in capsys.readouterr().out

    stamps = {p: p.stat().st_mtime_ns for p in config.output.glob("*/student.safetensors")}
    assert len(stamps) == 12
    demo(dataclasses.replace(config, seeds=1))
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    demo(dataclasses.replace(config, seeds=1, lr=2e-2))
    changed = {p.parent.name for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp}
    assert changed == {"flyp-0", "ema-0", "wma-0"}  # the adapters have a learning rate of their own


def test_each_variant_of_r_adapter_is_what_it_says(config):
    """Against the files of its runs, after the demo above."""
    start = load_file(config.pretrained)
    runs = {p.name: yaml.safe_load((p / "config.yaml").read_text()) for p in config.output.glob("r-adapter*")}
    keys = ("margin", "smoothing", "positives", "adapter_drop", "adapter_momentum", "lr", "weight_decay")
    settings = {name: tuple(run[key] for key in keys) for name, run in runs.items()}
    assert settings["r-adapter-1"] == (None, None, True, 0.2, 0.98, config.adapter_lr, None)
    assert settings["r-adapter-infonce-1"] == (0.0, 0.0, False, 0.2, 0.98, config.adapter_lr, None)
    assert settings["r-adapter-no-drop-1"] == (None, None, True, 0.0, 0.98, config.adapter_lr, None)

    demo(dataclasses.replace(config, seeds=1))
    results = json.loads((config.output / "results.json").read_text())
    methods = {method["key"]: method for method in results["methods"]}
    assert {key for key, method in methods.items() if method["variant_of"] == "r-adapter"} == set(VARIANTS)
    clip = load_clip(config.model, config.pretrained)
    sets = [read_index(path, name) for name, path in config.eval_data.items()]
    prompts = class_prompts(None, sets[1].classes)
    plain = load_file(config.output / "flyp-0" / "student.safetensors")
    weights = {"wise-ft": interpolate(start, plain, config.wise_alpha)}
    for key, file, alpha in (
        ("r-adapter", "adapters", 0.5),
        ("r-adapter-no-average", "adapters_last", 0.5),
        ("r-adapter-no-scaling", "adapters", 1.0),
    ):
        adapters = read_adapters(config.output / "r-adapter-0" / f"{file}.safetensors", "tiny-clip")
        weights[key] = fold(start | adapters, alpha)
    for key, state in weights.items():
        clip.model.load_state_dict(state)
        scores = numbers_alone(evaluate_zero_shot(clip, sets, prompts))
        for name, score in methods[key]["runs"][0]["eval"].items():
            assert {n: score[n] for n in scores[name]} == pytest.approx(scores[name]), key
            gain = score["accuracy"] - methods["zero-shot"]["runs"][0]["eval"][name]["accuracy"]
            assert score["accuracy_gain"] == pytest.approx(gain)


@pytest.mark.parametrize("loader", LOADERS)
def test_without_the_ablation_r_adapter_is_one_row(config, tmp_path, loader):
    demo(dataclasses.replace(config, ablate=False, seeds=1, output=tmp_path / "run", loader=loader))
    results = json.loads((tmp_path / "run/results.json").read_text())
    keys = [method["key"] for method in results["methods"]]
    assert keys == ["zero-shot", "flyp", "ema", "wma", "wise-ft", "r-adapter"]
    assert len(list((tmp_path / "run").glob("*/student.safetensors"))) == 4


def test_a_model_without_transformers_is_refused_before_any_training(config, tmp_path):
    with pytest.raises(UserError, match=r"ModifiedResNet.*adapt the 'text' tower alone.*--adapter_towers"):
        demo(dataclasses.replace(config, model="RN50", pretrained=None, output=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "make demo"),
        ({"ablate": True, "seeds": 1}, 'make demo ARGS="--seeds 1 --ablate true"'),
        (
            {"eval_data": {"a b": Path("x y.csv")}, "alphas": (0.5,), "lr": None},
            "make demo ARGS=\"'--eval_data.a b' 'x y.csv' --lr null --alphas '[0.5]'\"",
        ),
    ],
)
def test_the_report_says_how_to_repeat_it(changes, line):
    assert command_line(DemoConfig(**changes)) == line


def test_demo_needs_something_to_evaluate_on(config):
    with pytest.raises(UserError, match=r"give --eval_data.NAME"):
        demo(dataclasses.replace(config, eval_data={}))
