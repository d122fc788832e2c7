"""What the tests of awkward inputs share: the command line, run as a user runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tracer.cli import main


@pytest.fixture
def evaluate(tiny_config, tmp_path, capfd) -> Callable[..., tuple[int, str]]:
    """Run ``tracer evaluate`` on a set; return the exit code and stderr."""

    def run(data: Path, **options: object) -> tuple[int, str]:
        options = {
            "model": tiny_config,
            "pretrained": "null",
            "cache": tmp_path / "cache",
            "workers": 1,
        } | options
        arguments = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
        capfd.readouterr()
        code = main(["evaluate", "--eval_data.set", str(data), *arguments])
        return code, capfd.readouterr().err

    return run


@pytest.fixture
def refusal(evaluate) -> Callable[..., str]:
    """Run ``tracer evaluate`` on a set that it must refuse with one line; return that line."""

    def run(data: Path, **options: object) -> str:
        code, stderr = evaluate(data, **options)
        lines = [line for line in stderr.splitlines() if line.startswith("tracer: error:")]
        assert code == 2, stderr
        assert len(lines) == 1
        assert "Traceback" not in stderr
        return lines[0]

    return run
