"""The main job end to end in miniature: every method, interpolation, report, and reuse of what is there."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from tracer.config import DemoConfig
from tracer.demo import demo
from tracer.errors import UserError
from tracer.model import interpolate, load_clip, save_weights


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
        steps=4,
        warmup=1,
        batch_size=16,
        lr=1e-2,
    )


def test_demo_compares_every_method_and_reuses_finished_runs(config, capsys):
    report = demo(config)
    page = report.read_text()
    results = json.loads((config.output / "results.json").read_text())
    methods = {method["key"]: method for method in results["methods"]}
    assert list(methods) == ["zero-shot", "flyp", "ema", "wma", "wise-ft"]
    for key, method in methods.items():
        assert [run["seed"] for run in method["runs"]] == ([None] if key == "zero-shot" else [0, 1])
        for run in method["runs"]:
            assert set(run["eval"]) == {"same", "other"}
        assert method["name"] in page
    assert [domain["kind"] for domain in results["domains"]] == ["in-distribution", "shifted"]
    assert [(p["seed"], p["alpha"]) for p in results["wise_ft"]] == [
        (seed, alpha) for seed in (0, 1) for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    # distillation ran where it should: plain runs have no teacher, the others a gap that opened
    assert methods["flyp"]["runs"][0]["teacher_eval"] is None
    assert methods["flyp"]["runs"][0]["log"][-1]["relational"] == 0
    for key in ("ema", "wma"):
        assert methods[key]["runs"][0]["log"][-1]["relational"] > 1e-5
        assert set(methods[key]["runs"][0]["teacher_eval"]) == {"same", "other"}
    assert len(results["examples"]) == 8
    assert set(results["examples"][0]["predictions"]) == {"zero-shot", "flyp", "ema", "wma"}
    assert "FLYP" in capsys.readouterr().out

    stamps = {p: p.stat().st_mtime_ns for p in config.output.glob("*/student.safetensors")}
    assert len(stamps) == 6
    demo(dataclasses.replace(config, seeds=1))
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    demo(dataclasses.replace(config, seeds=1, lr=2e-2))
    changed = {p.parent.name for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp}
    assert changed == {"flyp-0", "ema-0", "wma-0"}


def test_demo_needs_something_to_evaluate_on(config):
    with pytest.raises(UserError, match=r"give --eval_data.NAME"):
        demo(dataclasses.replace(config, eval_data={}))


def test_interpolation_ends_at_both_models():
    start = {"w": torch.zeros(2), "n": torch.tensor(1)}
    end = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(5)}
    assert torch.equal(interpolate(start, end, 0.0)["w"], start["w"])
    assert torch.equal(interpolate(start, end, 1.0)["w"], end["w"])
    assert interpolate(start, end, 0.25)["w"].tolist() == [0.25, 0.5]
    assert interpolate(start, end, 0.25)["n"] == 5
