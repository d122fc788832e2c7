"""A run whose teacher shares frozen parts with its student ends as one in which both compute for themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from tracer.train import loop
from tracer.train.run import finetune


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_run_is_the_same_with_and_without_sharing(config, monkeypatch, tmp_path, zero_stage):
    changes = {"freeze_image_blocks": 1, "freeze": "text", "steps": 3, "warmup": 1, "zero_stage": zero_stage}
    config = dataclasses.replace(config, **changes)
    kept, made = loop.SharedPrefix, []

    def noted(*arguments):
        made.append(kept(*arguments))
        return made[-1]

    monkeypatch.setattr(loop, "SharedPrefix", noted)
    shared = finetune(config)
    assert made[0].shared["image"] == 1
    assert made[0].shared["text"] > 0
    monkeypatch.setattr(loop, "SharedPrefix", lambda student, teacher: kept(student, None))
    apart = finetune(dataclasses.replace(config, output=tmp_path / "apart"))
    for name in ("student", "teacher"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (shared, apart))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
