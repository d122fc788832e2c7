"""The protocol: the same trials for all, chosen by validation alone, tested once, and resumed where it stopped."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
import torch
from results_schema import validate
from safetensors.torch import load_file

from tracer.cli import main
from tracer.data.config import LoadingSettings
from tracer.demo.config import SweepConfig
from tracer.demo.sweep import Choice, Trial, choose, points, settings_of, sweep
from tracer.errors import UserError
from tracer.evaluation.recognise import read_sets
from tracer.evaluation.zero_shot import evaluate_sets
from tracer.models.clip import load_clip
from tracer.models.soups import interpolate
from tracer.models.weights import save_weights


@pytest.fixture(scope="module")
def config(tiny_config, drawings, tmp_path_factory) -> SweepConfig:
    """Two methods, two rates and two seeds of three steps; half of the test drawings are the validation set."""
    folder = tmp_path_factory.mktemp("sweep")
    torch.manual_seed(0)
    save_weights(load_clip(str(tiny_config), None).model.state_dict(), folder / "start.safetensors")
    rows = list(csv.DictReader((drawings / "test.csv").open()))
    for name, part in (("validation", rows[:8]), ("same", rows[8:])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["image", "label", "captions"])
            writer.writeheader()
            writer.writerows(row | {"image": str(drawings / row["image"])} for row in part)
    return SweepConfig(
        train_data=drawings / "train.csv",
        eval_data={"same": folder / "same.csv", "other": drawings / "train.csv"},
        validation=folder / "validation.csv",
        methods=("flyp", "wma"),
        grid={"lr": [1e-2, 1e-3]},
        model=str(tiny_config),
        pretrained=str(folder / "start.safetensors"),
        output=folder / "run",
        cache=folder / "cache",
        precision="fp32",
        seeds=2,
        alphas=(),
        steps=3,
        warmup=1,
        batch_size=16,
    )


def test_a_sweep(config):
    page = sweep(config).read_text()
    results = json.loads((config.output / "results.json").read_text())
    validate(results)
    assert [m["key"] for m in results["methods"]] == ["zero-shot", "flyp", "wma", "wise-ft"]
    runs = sorted(p.parent.name for p in config.output.glob("*/student.safetensors"))
    assert runs == sorted(
        f"{method}-{run}" for method in config.methods for run in ("trial-0", "trial-1", "seed-1")
    )
    for method in config.methods:
        choice = results["choices"][method]
        scores = [trial["validation"] for trial in choice["trials"]]
        assert [trial["point"] for trial in choice["trials"]] == [{"lr": 1e-2}, {"lr": 1e-3}]
        best = scores.index(max(scores))
        assert choice["chosen"] == choice["trials"][best]["point"]
        for n in range(2):  # what chose is the validation set alone
            metrics = json.loads((config.output / f"{method}-trial-{n}/metrics.json").read_text())
            assert set(metrics["scores"]["student"]) == {"validation"}
            assert metrics["scores"]["student"]["validation"]["accuracy"] == scores[n]
        curve = next(c for c in results["curves"] if c["key"] == method)
        assert [(p["seed"], p["alpha"]) for p in curve["points"]] == [
            (s, a) for s in (0, 1) for a in (0, 0.5, 1)
        ]
        assert set(results["soups"][method]) == {"uniform", "greedy", "fisher"}
        assert results["soups"][method]["greedy"]["validation"] >= max(scores)
    # the line's middle is what averaging by hand scores
    clip = load_clip(config.model, config.pretrained)
    start = clip.model.state_dict()
    start = {name: value.clone() for name, value in start.items()}
    folder = config.output / next(
        t["run"]
        for t in results["choices"]["flyp"]["trials"]
        if t["point"] == results["choices"]["flyp"]["chosen"]
    )
    clip.model.load_state_dict(interpolate(start, load_file(folder / "student.safetensors"), 0.5))
    sets = read_sets(config.eval_data, LoadingSettings(workers=1))
    wise = next(m for m in results["methods"] if m["key"] == "wise-ft")["runs"][0]["eval"]
    for name, scored in evaluate_sets(clip, sets, workers=1).items():
        assert wise[name]["accuracy"] == scored.score["accuracy"]
        assert wise[name]["nll"] == pytest.approx(scored.score["nll"])
    pairs = {(p["one"], p["other"], p["column"], p["measure"]) for p in results["pairs"]}
    assert ("wma", "flyp", "shifted", "accuracy") in pairs
    assert ("wma", "wise-ft", "in-distribution", "ece") in pairs
    assert "paired 95 % intervals" in page
    assert "best of 2 trials on the validation set" in page


def test_a_sweep_goes_on_and_refuses_another_grid(config, capsys):
    """After the sweep above."""
    stamps = {p: p.stat().st_mtime_ns for p in config.output.glob("*/student.safetensors")}
    sweep(dataclasses.replace(config, soups=False))
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    other = dataclasses.replace(config, grid={"lr": [1e-2]})
    with pytest.raises(
        UserError,
        match=r"the grid of '.*run' was .*0.001.* and is now .*0.01.*: all methods must get the same",
    ):
        sweep(other)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


def test_the_first_of_equal_trials_is_chosen(tmp_path):
    trials = [Trial({"lr": n}, tmp_path, accuracy) for n, accuracy in enumerate((0.25, 0.5, 0.5))]
    choice = choose(trials)
    assert choice == Choice(trials, trials[1], choice.why)
    assert choice.why == "best of 3 trials on the validation set: 50.0 %, the next 50.0 %"


def test_points_and_rates(config):
    grid = {"lr_times": [0.5, 2.0], "steps": [3, 5]}
    assert points(grid) == [
        {"lr_times": a, "steps": b} for a in (0.5, 2.0) for b in (3, 5)
    ]  # in the order of declaration
    run = settings_of(config, "wma", {"lr_times": 2.0, "steps": 5}, 1, "name")
    assert (run.lr, run.steps, run.teacher, run.seed) == (2 * config.lr, 5, "wma", 1)
    assert list(run.eval_data) == ["validation"]
    adapted = settings_of(config, "r-adapter", {"lr_times": 2.0}, 0, "name")
    assert adapted.lr == 2 * config.adapter_lr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": ("flypp",)}, "--methods flypp: the methods are flyp, flyp-multi"),
        ({"methods": ()}, "--methods is empty: the methods are"),
        ({"grid": {"rate": [1.0]}}, "--grid.rate is not a setting of a run"),
        ({"grid": {"lr": []}}, "--grid.lr has no values"),
        ({"grid": {"lr": [1.0], "lr_times": [1.0]}}, "--grid.lr and --grid.lr_times exclude each other"),
        ({"validation": None}, "a sweep chooses by --validation: give a folder"),
    ],
)
def test_what_makes_no_sense_is_one_line(config, changes, says):
    with pytest.raises(UserError, match=says):
        sweep(dataclasses.replace(config, **changes))


def test_validation_on_test_pictures_is_refused(config, tmp_path):
    changes = {"validation": config.eval_data["same"], "output": tmp_path / "run"}
    with pytest.raises(
        UserError, match=r"png' is in --validation and in --eval_data.same: a choice by test pictures"
    ):
        sweep(dataclasses.replace(config, **changes))
    assert not (tmp_path / "run").exists()


def test_the_command(config, capsys):
    argv = ["sweep", "--train_data", config.train_data, "--methods", "[flyp]", "--grid.lr_times", "[1, 2]"]
    assert main([str(a) for a in argv]) == 2
    assert "a sweep chooses by --validation" in capsys.readouterr().err
