"""Cut runs off, or end them, in one process without ranks: for the tests of runs on several ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cut_runs import cut, quiet

from tracer.cli import parse
from tracer.train.run import finetune

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(part: str, files: list[Path], output: Path) -> None:
    """Cut the runs of these settings off ("cut") or end them ("go on"); what they print goes to ``output``."""
    quiet(output)
    for name in LAUNCHER:
        os.environ.pop(name, None)
    for file in files:
        _, config = parse(["finetune", "--config", str(file)])
        if part == "cut":
            cut(config, pytest.MonkeyPatch(), 3)
            assert Path(f"{config.output}.part/checkpoint-2").exists()
        else:
            finetune(config)
