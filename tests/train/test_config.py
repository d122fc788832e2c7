"""The settings of a run: the recipe of each method, steps and epochs, and the file that reads them back."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from tracer.cli import parse
from tracer.losses import TracerLoss
from tracer.train.cautions import caution_of_size, idle_options, missing_parts, resting_averages
from tracer.train.config import Config


def read_back(config: Config, folder: Path, *options: str) -> Config:
    (folder / "config.yaml").write_text(config.to_yaml())
    return parse(["finetune", "--config", str(folder / "config.yaml"), *options])[1]


def test_settings_written_by_a_run_are_read_back_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "start.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    config = Config(
        train_data=Path("x.csv"), eval_data={"a": Path("a.csv")}, lr=2e-6, pretrained="start.safetensors"
    )
    (tmp_path / "elsewhere").mkdir()
    text = config.to_yaml()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "config.yaml").write_text(text)
    read = parse(["finetune", "--config", str(tmp_path / "config.yaml")])[1]
    here = {"train_data": "x.csv", "pretrained": "start.safetensors", "output": "runs/finetune"}
    for name, path in here.items():
        assert str(getattr(read, name)) == str(tmp_path / path)
    assert read.eval_data == {"a": tmp_path / "a.csv"}
    assert read.recipe == config.recipe == (0.0, 0.0, 2e-6, 0.1)


def test_an_address_in_a_saved_file_stays_one(tmp_path):
    config = Config(train_data="s3://bucket/{0..9}.tar", model="hf-hub:timm/x")
    read = read_back(config, tmp_path)
    assert (read.train_data, read.model) == (Path("s3:/bucket/{0..9}.tar"), "hf-hub:timm/x")


def test_another_method_brings_its_own_recipe_to_a_saved_file(tmp_path):
    """What nobody chose is unset in the file, and stands beside it; what was chosen stays."""
    config = Config(train_data="x.csv", weight_decay=0.3, teacher="ema", steps=100)
    text = config.to_yaml().splitlines()
    for line in (
        "lr: null  # 1e-05",
        "margin: null  # 0.0",
        "warmup: null  # 25",
        "teacher_every: null  # 2",
    ):
        assert line in text
    assert "weight_decay: 0.3" in text
    read = read_back(config, tmp_path, "--method", "r-adapter")
    assert read.recipe == (0.05, 0.05, 5e-4, 0.3)


def test_a_file_leaves_the_settings_of_a_baseline_unset(tmp_path):
    """Another --baseline then brings its own, and the file says what the settings were."""
    config = parse(["finetune", "--train_data", "x.csv", "--baseline", "flyp", "--lr", "1e-3"])[1]
    read = read_back(config, tmp_path, "--baseline", "carot")
    assert (read.method, read.teacher, read.distill_weight, read.lr) == ("tracer", "ema", 1.0, 1e-3)
    again = read_back(config, tmp_path)
    assert (again.method, again.positives) == ("flyp", False)
    assert again.taken() == config.taken()
    assert "method: tracer  # flyp" in config.to_yaml().splitlines()


@pytest.mark.parametrize(
    ("changes", "every", "warmup"),
    [
        ({"teacher": "ema", "steps": 25}, 1, 6),
        ({"teacher": "ema", "steps": 2000}, 40, 500),
        ({"teacher": "ema", "steps": 25_020}, 500, 500),  # the published run
        ({"steps": 25_020}, 1, 500),
        ({"teacher": "ema", "teacher_every": 7, "warmup": 0, "steps": 25}, 7, 0),
    ],
)
def test_defaults_follow_the_length_of_the_run(changes, every, warmup):
    config = Config(train_data="x.csv", **changes)
    assert (config.moves_every, config.warmup_steps) == (every, warmup)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            "--method flyp --teacher ema --distill_weight 3",
            "--teacher ema, --distill_weight 3.0 have no effect with --method flyp, which has no teacher",
        ),
        (
            "--method r-adapter --projection_product 1",
            "--projection_product 1.0 has no effect with --method",
        ),
        ("--adapter_rank 8", "--adapter_rank 8 has no effect without adapters: add --adapters true"),
        ("--ema_end 0.5", "--ema_end 0.5 has no effect with --teacher wma"),
        ("--teacher ema --wma_beta 1", "--wma_beta 1.0 has no effect with --teacher ema"),
        ("--teacher frozen --teacher_every 2", "--teacher_every 2 has no effect with --teacher frozen"),
        ("--distill_weight 0 --cross 2", "--cross 2.0 has no effect with --distill_weight 0"),
        ("--adapters true --projection_product 1", "where adapters train"),
        (
            "--method flyp --teacher_temperature 2",
            "--teacher_temperature 2.0 has no effect with --method flyp",
        ),
        ("--ldreg_neighbours 8", "--ldreg_neighbours 8 has no effect without --ldreg"),
        ("--baseline flyp", ""),
        ("--baseline carot", ""),
        ("--classes c.json", "--classes c.json has no effect without evaluation sets"),
        ("--classes c.json --method flyp --classifier probe", ""),  # it begins with their prompts
        ("--micro_batch 512", "--micro_batch 512 has no effect as it is not below --batch_size 512"),
        ("--mesh ring", "--mesh ring has no effect on a single process"),
        ("", ""),
        ("--method r-adapter --adapter_rank 8 --margin 0.1", ""),
        ("--adapters true --adapter_rank 8", ""),
        ("--teacher ema --ema_end 0.5 --teacher_every 3", ""),
    ],
)
def test_an_option_without_effect_is_said(options, says):
    config = parse(["finetune", "--train_data", "x.csv", *options.split()])[1]
    sentences = list(idle_options(config))
    assert len(sentences) == bool(says)
    assert says in "".join(sentences)


def test_an_average_that_rests_is_said():
    rests = Config(train_data="x.csv", teacher="ema", teacher_every=500, steps=25)
    assert "the teacher will not move: it does so every 500 steps" in "".join(resting_averages(rests))
    slow = Config(train_data="x.csv", method="r-adapter", steps=500)
    assert "the adapters' average will hold 39% of them" in "".join(resting_averages(slow))
    assert not list(resting_averages(Config(train_data="x.csv", teacher="ema", steps=25)))


@pytest.mark.parametrize(("pictures", "error"), [(30, "up to 9 points"), (100, None)])
def test_a_small_set_is_said(pictures, error):
    text = caution_of_size("a", pictures)
    assert (text is None) if error is None else (text is not None and error in text)


@pytest.mark.parametrize(
    ("options", "recipe"),  # margin, smoothing, learning rate, weight decay
    [
        ("", (0.0, 0.0, 1e-5, 0.1)),
        ("--method flyp", (0.0, 0.0, 1e-5, 0.1)),
        ("--method r-adapter", (0.05, 0.05, 5e-4, 0.0)),
        ("--method tracer --adapters true", (0.0, 0.0, 5e-4, 0.0)),
        ("--method r-adapter --margin 0 --lr 1e-3 --weight_decay 0.2", (0.0, 0.05, 1e-3, 0.2)),
    ],
)
def test_each_method_has_its_published_recipe(options, recipe):
    assert parse(["finetune", "--train_data", "x.csv", *options.split()])[1].recipe == recipe


def test_epochs_stand_in_place_of_steps():
    for command, steps in (("finetune", 2000), ("demo", 150)):
        options = [command, *(["--train_data", "x.csv"] if command == "finetune" else [])]
        assert parse(options)[1].steps == steps
        config = parse([*options, "--epochs", "3"])[1]
        config.validate()  # the warm-up is compared with the steps that they make
        assert (config.steps, config.epochs) == (None, 3)


def test_the_loss_and_the_settings_have_the_same_defaults():
    settings = {field.name: field.default for field in dataclasses.fields(Config)}
    parameters = inspect.signature(TracerLoss).parameters
    # These depend on method and model, and on the ranks.
    shared = settings.keys() & parameters.keys() - {"margin", "smoothing", "contrast", "mesh"}
    assert len(shared) == 8
    for name in shared:
        assert settings[name] == parameters[name].default, name


def test_penalties_without_projections_are_said():
    """Regression: a ResNet was trained without them, and without a word."""
    config, resnet, vit = Config(train_data="x.csv"), nn.Module(), nn.Module()
    resnet.visual, vit.visual = nn.Module(), nn.Module()
    vit.visual.proj = resnet.text_projection = vit.text_projection = nn.Parameter(torch.zeros(4, 4))
    assert missing_parts(config, vit) == []
    (text,) = missing_parts(config, resnet)
    assert text.startswith(
        f"--projection_product {config.projection_product:g} has no effect: a tower of the model"
    )
    assert missing_parts(dataclasses.replace(config, method="flyp"), resnet) == []
    both = missing_parts(dataclasses.replace(config, projection_orthogonal=0.2), resnet)
    assert " and --projection_orthogonal 0.2 have no effect" in both[0]
