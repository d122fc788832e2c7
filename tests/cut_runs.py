"""Cut a fine-tuning run off in its middle, for the tests of what continues it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracer.data.batches import TrainingBatches
from tracer.files import aside
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


def content(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
