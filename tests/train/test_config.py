"""The settings of a run: the recipe of each method, steps and epochs, and the file that reads them back."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

from tracer.cli import parse
from tracer.losses import TracerLoss
from tracer.train.config import Config


def test_settings_written_by_a_run_are_read_back(tmp_path):
    config = Config(train_data=Path("x.csv"), eval_data={"a": Path("a.csv")}, lr=2e-6, pretrained=None)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    read = parse(["finetune", "--config", str(tmp_path / "config.yaml")])[1]
    assert read == dataclasses.replace(config, **config.recipe._asdict())  # the defaults are filled in
    assert read.recipe == config.recipe == (0.0, 0.0, 2e-6, 0.1)


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
    for command, steps in (("finetune", 2000), ("demo", 100)):
        options = [command, *(["--train_data", "x.csv"] if command == "finetune" else [])]
        assert parse(options)[1].steps == steps
        config = parse([*options, "--epochs", "3"])[1]
        config.validate()  # the warm-up is compared with the steps that they make
        assert (config.steps, config.epochs) == (None, 3)


def test_the_loss_and_the_settings_have_the_same_defaults():
    settings = {field.name: field.default for field in dataclasses.fields(Config)}
    parameters = inspect.signature(TracerLoss).parameters
    shared = settings.keys() & parameters.keys() - {"margin", "smoothing"}  # these depend on the method
    assert len(shared) == 7
    for name in shared:
        assert settings[name] == parameters[name].default, name
