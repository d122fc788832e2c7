"""What the processes of tests are forked with: imports that would take each of them longer than its work."""

from __future__ import annotations

import deepspeed  # noqa: F401
import pytest  # noqa: F401

import tracer.cli
import tracer.evaluation.evaluate
import tracer.train.run  # noqa: F401
