"""Cut a fine-tuning run off in its middle, or kill it, for the tests of what continues it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
    """Start the run from the command line, and kill it once it has saved step ``after`` or a later one.

    ``settings`` is the file to which the run's settings are written.
    """
    settings.write_text(config.to_yaml())
    command = [sys.executable, "-m", "tracer", "finetune", "--config", str(settings)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    part, patience = aside(config.output), time.monotonic() + 120
    while (last := newest(part)) is None or int(last.name.rpartition("-")[2]) < after:
        assert run.poll() is None, run.communicate()[0].decode()
        assert time.monotonic() < patience
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGKILL)  # so that nothing of it can tidy up
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert part.exists()
    assert not config.output.exists()


def content(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
