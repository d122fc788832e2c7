"""What this machine is, and the precision that follows from it."""

from __future__ import annotations

import os
import platform

import pytest
import torch

import tracer
from tracer.machine import machine, resolve_precision, versions


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16"])
def test_a_precision_that_was_named_is_used(precision):
    assert resolve_precision(precision) == precision


@pytest.mark.parametrize(
    ("unit", "precision"), [("AMX", "amp_bf16"), ("AVX-512", "amp_bf16"), (None, "fp32")]
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(monkeypatch, unit, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: unit == "AMX")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: unit is not None)
    assert tracer.machine.bfloat16_unit() == unit
    assert resolve_precision("auto") == precision


def test_the_machine_and_its_versions_are_named():
    assert versions()["tracer"] == tracer.__version__
    assert versions()["python"] == platform.python_version()
    assert versions()["torch"].startswith(torch.__version__.partition("+")[0])
    here = machine()
    assert here["processor"]
    assert here["cores"] == len(os.sched_getaffinity(0))
    assert here["memory_gib"] > 0
