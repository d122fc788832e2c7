"""The drop-in in open_clip's own training script, in miniature."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
from contextlib import contextmanager
from pathlib import Path

import open_clip
import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "open_clip_training.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("open_clip_training", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def own_logging():
    """open_clip's script adds handlers to the root logger and sets every logger's level: undo it."""
    root, handlers, level = logging.root, list(logging.root.handlers), logging.root.level
    levels = {name: logging.getLogger(name).level for name in root.manager.loggerDict}
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
        for name in root.manager.loggerDict:
            logging.getLogger(name).setLevel(levels.get(name, logging.NOTSET))


def logged_losses(folder, name):
    log = (folder / "logs" / name / "out.log").read_text()
    return [float(x) for x in re.findall(r"Contrastive_loss: ([\d.]+)", log)]


def test_open_clips_script_trains_the_same_with_our_loss(example, tmp_path):
    """Eight steps from one seed: the same losses as with open_clip's own, to the digits it logs."""
    with own_logging():
        example.train(example.tiny_run(tmp_path, "ours"))
    with own_logging():
        example.train(example.tiny_run(tmp_path, "open_clip"), loss=open_clip.create_loss)
    ours, reference = logged_losses(tmp_path, "ours"), logged_losses(tmp_path, "open_clip")
    assert len(ours) == 8
    assert ours == pytest.approx(reference, abs=2e-4)
    assert ours[-1] < ours[0]
    assert (tmp_path / "logs" / "ours" / "checkpoints" / "epoch_2.pt").is_file()


def test_the_options_choose_the_loss(example):
    """SigLIP's with --siglip; a loss that the example has not is refused instead of replaced."""
    options = {
        "local_loss": True, "gather_with_grad": True, "rank": 0, "world_size": 1, "horovod": False,
        "loss_dist_impl": None, "siglip": False, "distill": False, "model": "ViT-B-32",
    }  # fmt: skip
    assert type(example.create_loss(argparse.Namespace(**options))).__name__ == "ClipLoss"
    siglip = example.create_loss(argparse.Namespace(**options | {"siglip": True}))
    assert type(siglip).__name__ == "SigLipLoss"
    for other in ({"distill": True}, {"model": "coca_ViT-B-32"}):
        with pytest.raises(SystemExit, match="no CoCa"):
            example.create_loss(argparse.Namespace(**options | other))
