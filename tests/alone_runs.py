"""Cut runs off, or end runs that were cut off, in this one process: for the tests of runs on several ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cut_runs import cut

from tracer.cli import parse
from tracer.train.run import finetune

if __name__ == "__main__":
    part, *files = sys.argv[1:]
    for file in files:
        _, config = parse(["finetune", "--config", file])
        if part == "cut":
            cut(config, pytest.MonkeyPatch(), 3)
            assert Path(f"{config.output}.part/checkpoint-2").exists()
        else:
            finetune(config)
