"""The numbers in the settings of every command are checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tracer.demo.config import DemoConfig, PretrainConfig
from tracer.errors import UserError
from tracer.evaluation.config import EvaluateConfig
from tracer.train.config import Config


def test_the_settings_as_they_come_are_valid():
    for settings in (Config(Path("x.csv")), DemoConfig(), EvaluateConfig(eval_data={}), PretrainConfig()):
        settings.validate()


@pytest.mark.parametrize("settings", [Config, DemoConfig, EvaluateConfig, PretrainConfig])
def test_every_number_is_checked(settings):
    """None of the settings may be negative or not finite."""
    needed = {"train_data": Path("x.csv")} if settings is Config else {}
    if settings is EvaluateConfig:
        needed = {"eval_data": {"a": Path("a.csv")}}
    seen = False
    for field in dataclasses.fields(settings):
        kind = str(field.type)
        if ("float" not in kind and "int" not in kind) or "list" in kind:
            continue  # the values of a grid are checked in the runs that they make
        seen = True
        not_finite = () if "int" in kind else (float("nan"), float("inf"), float("-inf"))
        signed = field.name == "logit_bias"  # whose published value is negative
        for bad in not_finite if signed else (-1, *not_finite):
            value = (0.5, bad) if "tuple" in kind else bad
            with pytest.raises(UserError, match=rf"^--{field.name} is {bad}: it "):
                settings(**needed | {field.name: value}).validate()
    assert seen
