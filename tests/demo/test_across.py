"""What the command ``compare`` calls the runs that it finds."""

from __future__ import annotations

import pytest

from tracer.demo.across import _name_of
from tracer.train.config import Config


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "TRACER, WMA"),
        ({"teacher": "frozen", "adapters": True}, "TRACER, frozen with adapters"),
        ({"method": "flyp"}, "FLYP"),
        ({"method": "r-adapter"}, "R-Adapter"),
        ({"method": "flyp", "classifier": "probe-first"}, "Classifier (probe-first)"),  # regression: "FLYP"
        ({"baseline": "linear-probe"}, "Linear probe"),
        ({"baseline": "carot"}, "CaRot"),
    ],
)
def test_a_method_is_named_by_what_was_trained(settings, name):
    config = Config(train_data="x", **settings)
    assert _name_of(config.plain() | config.taken()) == name
