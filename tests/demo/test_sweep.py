"""The protocol: the same trials for all, chosen by validation alone, tested once, and resumed where it stopped."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from results_schema import validate
from safetensors.torch import load_file

from tracer.cli import main, parse
from tracer.data.config import LoadingSettings
from tracer.demo import compare, judge
from tracer.demo import sweep as protocol
from tracer.demo.config import DemoConfig, SweepConfig
from tracer.demo.methods import METHODS
from tracer.demo.runs import settings_of
from tracer.demo.sweep import Choice, Trial, choose, points, sweep
from tracer.errors import Diverged, UserError
from tracer.evaluation.recognise import read_sets
from tracer.evaluation.zero_shot import evaluate_sets
from tracer.models.clip import load_clip
from tracer.models.soups import interpolate
from tracer.models.weights import save_weights


@pytest.fixture(scope="module")
def config(tiny_config, drawings, tmp_path_factory) -> SweepConfig:
    """Two methods, two rates and two seeds of two steps; half of the test drawings are the validation set."""
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
        steps=2,
        warmup=1,
        batch_size=16,
        log_to=[],
    )


def results_of(config) -> dict:
    return json.loads((config.output / "results.json").read_text())


def test_a_sweep(config, monkeypatch):
    titles = []

    def trained(run, series):
        titles.append(series.title)
        return once(run, series)

    once = protocol.run_once
    monkeypatch.setattr(protocol, "run_once", trained)
    page = sweep(config).read_text()
    results = results_of(config)
    validate(results)
    assert [m["key"] for m in results["methods"]] == ["zero-shot", "flyp", "wma", "wise-ft"]
    names = [f"{m}-trial-{n}" for m in config.methods for n in range(2)]
    names += [f"{m}-seed-1" for m in config.methods]
    assert titles == [f"run {n} of 6: {name}" for n, name in enumerate(names, 1)]
    assert {p.parent.name for p in config.output.glob("*/student.safetensors")} == set(names)
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
        pairs = results["soups"][method]["uniform"]["pairs"]
        measured = [(p["one"], p["other"], p["column"], p["measure"]) for p in pairs]
        kinds = [(c, m) for c in ("in-distribution", "shifted") for m in ("accuracy", "ece")]
        assert measured == [("uniform", method, c, m) for c, m in kinds]
        soup, chosen = (
            results["soups"][method]["uniform"]["eval"],
            next(m for m in results["methods"] if m["key"] == method)["runs"][0]["eval"],
        )
        gain = soup["same"]["accuracy"] - chosen["same"]["accuracy"]
        assert pairs[0]["value"] == pytest.approx(gain)
        assert pairs[0]["low"] <= gain <= pairs[0]["high"]
    assert set(results["examples"][0]["predictions"]) == {"zero-shot", "flyp", "wma"}
    pairs = {(p["one"], p["other"], p["column"], p["measure"]) for p in results["pairs"]}
    assert ("wma", "flyp", "shifted", "accuracy") in pairs
    assert ("wma", "wise-ft", "in-distribution", "ece") in pairs
    assert "paired 95 % intervals" in page
    assert "best of 2 trials on the validation set" in page
    assert 'aria-label="Validation score against lr, a line for each method"' in page


def test_the_line_s_middle_is_what_averaging_by_hand_scores(config):
    """After the sweep above."""
    clip, results = load_clip(config.model, config.pretrained), results_of(config)
    start = {name: value.clone() for name, value in clip.model.state_dict().items()}
    choice = results["choices"]["flyp"]
    (run,) = (trial["run"] for trial in choice["trials"] if trial["point"] == choice["chosen"])
    trained = load_file(config.output / run / "student.safetensors")
    clip.model.load_state_dict(interpolate(start, trained, 0.5))
    sets = read_sets(config.eval_data, LoadingSettings(workers=1))
    wise = next(m for m in results["methods"] if m["key"] == "wise-ft")["runs"][0]["eval"]
    for name, scored in evaluate_sets(clip, sets, workers=1).items():
        assert wise[name]["accuracy"] == scored.score["accuracy"]
        assert wise[name]["nll"] == pytest.approx(scored.score["nll"])


def test_a_sweep_goes_on_and_refuses_another_grid(config, monkeypatch):
    """After the sweep above: nothing is trained again, and another grid is refused before a model is loaded."""
    stamps = {p: p.stat().st_mtime_ns for p in config.output.glob("*/student.safetensors")}
    sweep(dataclasses.replace(config, soups=False, seeds=1))
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    # Regression: where WiSE-FT is FLYP itself, each pair was told twice.
    sweep(dataclasses.replace(config, soups=False, seeds=1, wise_alpha=1.0))
    pairs = [(p["one"], p["other"], p["column"], p["measure"]) for p in results_of(config)["pairs"]]
    assert len(set(pairs)) == len(pairs)
    monkeypatch.setattr(judge, "load_clip", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(
        UserError,
        match=r"the grid of '.*run' was .*0.001.* and is now .*0.01.*: all methods must get the same",
    ):
        sweep(dataclasses.replace(config, grid={"lr": [1e-2]}))


def test_a_trial_that_diverges_is_no_candidate(config, tmp_path):
    """Regression: it ended the sweep, with all that the other trials had reached."""
    changes = {"methods": ("flyp",), "grid": {"lr_times": [1e33, 1e3]}, "lr": 1e-5, "steps": 3, "seeds": 1}
    own = dataclasses.replace(config, **changes, output=tmp_path / "run")
    with pytest.warns(
        UserWarning, match=r'flyp-trial-0 diverged at {"lr_times": 1e\+33} and is no candidate'
    ):
        page = sweep(own).read_text()
    results = results_of(own)
    validate(results)
    choice = results["choices"]["flyp"]
    lost, kept = choice["trials"]
    assert (lost["validation"], lost["lr"]) == (None, pytest.approx(1e28))
    assert (choice["chosen"], choice["lr"]) == (kept["point"], pytest.approx(1e-2))
    assert re.fullmatch(r"the only trial: .* on the validation set; 1 trial diverged", choice["why"])
    assert results["soups"]["flyp"]["greedy"]["trials"] == ["flyp-trial-1"]
    assert "flyp-trial-0 diverged at" in page
    assert "lr_times 1,000, lr 0.01 (the only trial" in page
    again = dataclasses.replace(own, grid={"lr_times": [1e33]}, output=tmp_path / "none")
    with (
        pytest.warns(UserWarning, match="no candidate"),
        pytest.raises(UserError, match="every trial of flyp diverged: leave it out of --methods, or give a"),
    ):
        sweep(again)


def test_a_further_seed_that_diverges_ends_the_sweep_with_the_way_out(config, tmp_path, monkeypatch):
    def trained(run, series):
        if run.seed == 1:
            raise Diverged("the loss was not finite")
        return once(run, series)

    once = protocol.run_once
    monkeypatch.setattr(protocol, "run_once", trained)
    changes = {"methods": ("flyp",), "grid": {"lr": [1e-2]}, "seeds": 3}
    with pytest.raises(
        UserError, match=r'flyp-seed-1 diverged at the chosen {"lr": 0.01}: give --seeds 1, or'
    ):
        sweep(dataclasses.replace(config, **changes, output=tmp_path / "run"))


def test_parts_of_r_adapter_are_methods_of_the_same_protocol(config, tmp_path):
    changes = {"methods": ("r-adapter", "r-adapter-no-scaling"), "grid": {"lr": [1e-2]}, "seeds": 1}
    own = dataclasses.replace(config, **changes, soups=False, output=tmp_path / "run")
    sweep(own)
    results = results_of(own)
    of = {m["key"]: m["variant_of"] for m in results["methods"]}
    assert of == {"zero-shot": None, "r-adapter": None, "r-adapter-no-scaling": "r-adapter", "wise-ft": None}
    assert [curve["key"] for curve in results["curves"]] == ["r-adapter"]
    alpha = {
        p.parent.name: yaml.safe_load(p.read_text())["adapter_alpha"]
        for p in own.output.glob("*/config.yaml")
    }
    assert alpha == {"r-adapter-trial-0": 0.5, "r-adapter-no-scaling-trial-0": 1.0}


def test_a_sweep_that_loads_with_dali(config, tmp_path):
    """The others load with torch, which auto takes without a GPU."""
    changes = {"methods": ("flyp",), "grid": {"lr": [1e-2]}, "seeds": 1, "soups": False}
    own = dataclasses.replace(config, **changes, loader="dali", output=tmp_path / "run")
    sweep(own)
    assert [m["key"] for m in results_of(own)["methods"]] == ["zero-shot", "flyp", "wise-ft"]
    assert yaml.safe_load((own.output / "flyp-trial-0/config.yaml").read_text())["loader"] == "dali"


def test_what_each_part_of_r_adapter_sets(config):
    own = dataclasses.replace(config, methods=("flyp",), ablate=True, adapter_momentum=0.9)
    keys = ("positives", "margin", "smoothing", "adapter_drop", "adapter_momentum", "adapter_alpha")
    runs = {name: settings_of(own, name, {}, 0, name) for name in own.compared}
    assert {name: tuple(getattr(run, key) for key in keys) for name, run in runs.items()} == {
        "flyp": (False, None, None, 0.2, 0.9, 0.5),
        "r-adapter": (True, None, None, 0.2, 0.9, 0.5),
        "r-adapter-infonce": (False, 0.0, 0.0, 0.2, 0.9, 0.5),
        "r-adapter-no-drop": (True, None, None, 0.0, 0.9, 0.5),
        "r-adapter-no-average": (True, None, None, 0.2, 0.0, 0.5),
        "r-adapter-no-scaling": (True, None, None, 0.2, 0.9, 1.0),
    }
    assert all(run.lr == own.adapter_lr and run.adapted for name, run in runs.items() if name != "flyp")


def test_the_first_of_equal_trials_is_chosen(tmp_path):
    trials = [Trial({"lr": n}, n, tmp_path, score) for n, score in enumerate((0.25, 0.5, 0.5))]
    choice = choose(trials)
    assert choice == Choice(trials, trials[1], choice.why)
    assert choice.why == "best of 3 trials on the validation set: 50.0 %, the next 50.0 %"
    assert choose(trials[:1], "macro_f1").why == "the only trial: 25.0 % on the validation set by macro_f1"


def test_points_and_rates(config):
    grid = {"lr_times": [0.5, 2.0], "steps": [3, 5]}
    assert points(grid) == [
        {"lr_times": a, "steps": b} for a in (0.5, 2.0) for b in (3, 5)
    ]  # in the order of declaration
    run = settings_of(config, "wma", {"lr_times": 2.0, "steps": 5}, 1, "name")
    plain = dataclasses.replace(config, lr=None)
    assert (run.lr, run.steps, run.teacher, run.seed) == (2 * config.lr, 5, "wma", 1)
    assert list(run.eval_data) == ["validation"]
    assert settings_of(dataclasses.replace(config, lr=0.25), "wma", {"lr_times": 2.0}, 0, "name").lr == 0.5
    assert settings_of(plain, "linear-probe", {"lr_times": 2.0}, 0, "name").lr == 2e-3
    adapted = settings_of(config, "r-adapter", {"lr_times": 2.0}, 0, "name")
    assert adapted.lr == 2 * config.adapter_lr
    run = settings_of(config, "wma", {"epochs": 4}, 0, "name")
    assert (run.epochs, run.steps) == (4, None)
    # Regression: a method's own value took the place of a point's that is the default of finetune.
    assert settings_of(config, "carot", {"distill_weight": 0.9}, 0, "name").distill_weight == 0.9


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": ("flypp",)}, "--methods flypp: the methods are flyp, flyp-multi"),
        ({"methods": ()}, "--methods is empty: the methods are"),
        ({"methods": ("flyp", "wma", "flyp")}, "--methods names flyp 2 times: name it once"),
        ({"methods": ("r-adapter-no-drop",)}, "--methods r-adapter-no-drop lacks a part of r-adapter: add"),
        ({"methods": ("flyp", "r-adapter"), "freeze": "image"}, "--freeze image: r-adapter trains adapters"),
        ({"grid": {"rate": [1.0]}}, "--grid.rate is not a setting of a run"),
        ({"grid": {"lr": []}}, "--grid.lr has no values"),
        # Regression: both passed the checks.
        ({"grid": {"steps": [3, 4.0]}}, "--grid.steps has 4.0: --steps takes whole numbers"),
        ({"grid": {"precision": [16]}}, "--grid.precision: a grid holds numbers, and --precision takes none"),
        ({"grid": {"lr": [1.0, 1.0]}}, "--grid.lr has a value twice"),
        ({"grid": {"lr": [0.0]}}, r'flyp at {"lr": 0.0} of --grid: --lr is 0.0: it must be above 0'),
        ({"grid": {"lr": [1.0], "lr_times": [1.0]}}, "--grid.lr and --grid.lr_times exclude each other"),
        ({"validation": None}, "settings are chosen by --validation PATH: give a folder"),
        ({"validation": Path("nowhere")}, "'nowhere' does not exist"),
        ({"eval_data": {}}, "give --eval_data.NAME"),
    ],
)
def test_what_makes_no_sense_is_one_line(config, tmp_path, monkeypatch, changes, says):
    monkeypatch.setattr(judge, "load_clip", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=says):
        sweep(dataclasses.replace(config, output=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "option"), [("same", "eval_data.same"), ("other", "train_data")])
def test_validation_on_test_or_training_pictures_is_refused(config, tmp_path, monkeypatch, name, option):
    """Regression: pictures that one option names from the working directory passed for others."""
    monkeypatch.chdir(config.eval_data[name].parent)
    changes = {"validation": Path(config.eval_data[name].name), "output": tmp_path / "run"}
    with pytest.raises(UserError, match=rf"png' is in --validation and in --{option}: a choice by pictures"):
        sweep(dataclasses.replace(config, **changes))
    assert not (tmp_path / "run").exists()


def test_a_model_without_transformers_is_refused_before_any_training(config, tmp_path):
    changes = {"methods": ("flyp", "r-adapter"), "model": "RN50", "pretrained": None}
    with pytest.raises(UserError, match=r"ModifiedResNet.*adapt the 'text' tower alone.*--adapter_towers"):
        sweep(dataclasses.replace(config, **changes, output=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        # Regression: the methods before were trained first, for hours, and then the sweep ended.
        (
            {"methods": ("flyp", "l2-sp"), "micro_batch": 4},
            r'l2-sp at {"lr": 0.01} .*--l2_sp needs the whole',
        ),
        (
            {"methods": ("flyp", "linear-probe"), "zero_stage": 3},
            "linear-probe at .*leave out --zero_stage 3",
        ),
        ({"methods": ("flyp",), "smoothing": 0.1, "contrast": "sigmoid"}, "flyp at .*--smoothing 0.1 has no"),
        ({"grid": {"freeze_image_blocks": [0, 9]}}, r'flyp at {"freeze_image_blocks": 9} of --grid: '),
    ],
)
def test_what_a_model_does_not_allow_is_refused_before_any_training(
    config, tmp_path, monkeypatch, changes, says
):
    monkeypatch.setattr(protocol, "run_once", lambda *_: pytest.fail("a run was trained"))
    with pytest.raises(UserError, match=says):
        sweep(dataclasses.replace(config, output=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_classifier_without_labels_is_refused_before_a_model_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "load_clip", lambda *_: pytest.fail("a model was loaded"))
    rows = list(csv.DictReader(config.train_data.open()))
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "captions"])
        writer.writeheader()
        writer.writerows(
            {"image": str(config.train_data.parent / row["image"]), "captions": row["captions"]}
            for row in rows
        )
    changes = {"train_data": tmp_path / "train.csv", "eval_data": {"same": config.eval_data["same"]}}
    own = dataclasses.replace(config, methods=("flyp", "linear-probe"), output=tmp_path / "run", **changes)
    with pytest.raises(UserError, match=r"linear-probe at .* of --grid: 'train' has no labels"):
        sweep(own)


def test_the_command(config, capsys):
    argv = ["sweep", "--train_data", config.train_data, "--methods", "[flyp]", "--grid.lr_times", "[1, 2]"]
    assert main([str(a) for a in argv]) == 2
    assert "settings are chosen by --validation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "changes", "line"),
    [
        (DemoConfig, {}, "make demo"),
        (DemoConfig, {"ablate": True, "seeds": 2}, 'make demo ARGS="--seeds 2 --ablate true"'),
        (
            DemoConfig,
            {"eval_data": {"a b": Path("x y.csv")}, "alphas": (0.5,), "lr": None},
            "make demo ARGS=\"'--eval_data.a b' 'x y.csv' --lr null --alphas '[0.5]'\"",
        ),
        (DemoConfig, {"prompt_template": ['a "{}"', "the {}'s"]}, None),
        (SweepConfig, {}, "tracer sweep"),
        (
            SweepConfig,
            {"grid": {"lr_times": [1e-3, 1]}, "methods": ("flyp",)},
            "tracer sweep --methods '[flyp]' --grid.lr_times '[0.001, 1]'",
        ),
    ],
)
def test_the_report_says_how_to_repeat_it(settings, changes, line):
    config = settings(**changes)
    words = shlex.split(given := compare.command_line(config))
    assert given == (line or given)
    if settings is DemoConfig:  # as make passes them on
        words = ["tracer", "demo", *(shlex.split(words[2].removeprefix("ARGS=")) if words[2:] else [])]
    assert parse(words[1:])[1] == config


def test_the_demo_is_a_sweep_of_fewer_methods():
    assert set(DemoConfig().methods) <= set(SweepConfig().methods) <= set(METHODS)
    assert DemoConfig().grid == SweepConfig().grid
