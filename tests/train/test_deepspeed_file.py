"""The user's own DeepSpeed settings: what is merged, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from tracer.errors import UserError
from tracer.train.deepspeed_file import DECIDED_BY, REFUSED
from tracer.train.engine import deepspeed_settings
from tracer.train.identity import fingerprint
from tracer.train.run import finetune


@pytest.fixture
def given(config, tmp_path):
    """Return a function from the content of the file to the settings of a run with it."""

    def write(content):
        path = tmp_path / "deepspeed.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return dataclasses.replace(config, deepspeed=path)

    return write


def test_other_settings_are_merged_into_ours(config, given):
    zero = {"reduce_bucket_size": 1000, "stage": 1}
    settings = deepspeed_settings(
        given({"zero_optimization": zero, "wall_clock_breakdown": True, "steps_per_print": 7})
    )
    ours = deepspeed_settings(config)
    assert settings == ours | {"zero_optimization": zero, "wall_clock_breakdown": True, "steps_per_print": 7}


def test_what_says_the_same_or_auto_is_no_contradiction(given):
    """As in the files that are made for Hugging Face's trainer."""
    same = {"train_batch_size": "auto", "gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": 16}
    same |= {
        "zero_optimization": {"stage": "auto"},
        "bf16": {"enabled": "auto"},
        "scheduler": {"type": "auto"},
    }
    settings = deepspeed_settings(given(same))
    assert settings["train_batch_size"] == 16
    assert settings["bf16"] == {"enabled": False}
    assert "scheduler" not in settings


def nested(name: str, value: object) -> dict[str, object]:
    section, _, setting = name.partition(".")
    return {section: {setting: value}} if setting else {section: value}


@pytest.mark.parametrize("name", DECIDED_BY)
def test_contradictions_are_refused_with_the_option(given, name):
    value = 77 if "." in name or "size" in name else {"enabled": True}
    with pytest.raises(UserError, match=f"'{name}' in '.*' contradicts {DECIDED_BY[name]}: remove it there"):
        deepspeed_settings(given(nested(name, value)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_breaks_a_part_is_refused_with_the_reason(given, name):
    says = re.escape(f"cannot be set, since {REFUSED[name]}: remove it (--deepspeed)")
    with pytest.raises(UserError, match=f"'{name}' in '.*' {says}"):
        deepspeed_settings(given(nested(name, True)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON in UTF-8"),
        ("[1]", "holds no JSON object"),
        ({"zero_optimization": 2}, "'zero_optimization' in '.*' must be an object"),
        ({"fp16": {"initial_scale_power": 8}}, "'fp16' in '.*' has no effect without --precision fp16"),
    ],
)
def test_files_that_hold_something_else_are_refused(given, content, says):
    with pytest.raises(UserError, match=says):
        finetune(given(content))


def test_the_content_of_the_file_decides_the_run(given):
    one = fingerprint(given({"zero_optimization": {"reduce_bucket_size": 1000}}))
    assert one != fingerprint(given({"zero_optimization": {"reduce_bucket_size": 2000}}))
