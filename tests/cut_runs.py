"""Cut a fine-tuning run off in its middle, or kill it, for the tests of what continues it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import forked
import pytest

from tracer.cli import main
from tracer.data.batches import TrainingBatches
from tracer.files import aside
from tracer.train.checkpoint import newest
from tracer.train.config import Config
from tracer.train.run import finetune


def cut(config: Config, monkeypatch, batches: int) -> Path:
    """Interrupt the run after so many batches; returns what it leaves aside."""
    whole = TrainingBatches.__iter__

    def some(self):
        for n, batch in enumerate(whole(self)):
            if n == batches:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(TrainingBatches, "__iter__", some)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    assert not config.output.exists()
    return aside(config.output)


def kill(config: Config, settings: Path, after: int = 1) -> None:
    """Run the command line's main in a process, and kill it once it has saved step ``after`` or a later one.

    ``settings`` is the file to which the run's settings are written; what it prints stands beside it.
    """
    settings.write_text(config.to_yaml())
    output = settings.with_suffix(".log")
    arguments = (["finetune", "--config", str(settings)], output)
    run = forked.context().Process(target=_main, args=arguments)
    run.start()
    part, patience = aside(config.output), time.monotonic() + 120
    while (last := newest(part)) is None or int(last.name.rpartition("-")[2]) < after:
        assert run.is_alive(), output.read_text()
        assert time.monotonic() < patience
        time.sleep(0.002)
    run.kill()  # SIGKILL, so that nothing of it can tidy up
    run.join()
    assert run.exitcode == -signal.SIGKILL
    assert part.exists()
    assert not config.output.exists()


def _main(arguments: list[str], output: Path) -> None:
    quiet(output)
    sys.exit(main(arguments))


def quiet(output: Path) -> None:
    """Write to a file what this process prints from now on."""
    with output.open("w") as file:
        for printed in (1, 2):
            os.dup2(file.fileno(), printed)


def content(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
