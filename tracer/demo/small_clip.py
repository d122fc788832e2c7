"""The demo's small CLIP: its tokenizer, its weights, and its registration as ``tracer-demo``."""

from __future__ import annotations

import copy
import gzip
import json
import tempfile
from pathlib import Path

import open_clip
from open_clip import tokenizer
from torch import nn

from tracer.demo.packages import ASSETS
from tracer.models.architecture import Architecture
from tracer.models.picture_format import PictureFormat
from tracer.models.registry import register_model
from tracer.models.weights import read_weights

NAME = "tracer-demo"
CHECKPOINT = ASSETS / "tracer-demo.safetensors"  # the demo's pretrained start
CONFIG = json.loads((ASSETS / "tracer-demo.json").read_text())  # in open_clip's words

PIXEL_MEAN, PIXEL_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD  # of RGB in [0, 1]


def demo_tokenizer() -> open_clip.SimpleTokenizer:
    """Return open_clip's tokenizer cut to its first merges, which is the vocabulary of the demo's model."""
    config = CONFIG["text_cfg"]
    merges = config["vocab_size"] - 2 * 256 - 2  # bytes inside and at the end of words, start and end of text
    lines = gzip.decompress(Path(tokenizer.default_bpe()).read_bytes()).decode("utf-8").split("\n")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "merges.txt.gz"
        path.write_bytes(gzip.compress("\n".join(lines[: 1 + merges]).encode()))
        return tokenizer.SimpleTokenizer(bpe_path=str(path), context_length=config["context_length"])


def demo_model(checkpoint: Path | None = CHECKPOINT) -> open_clip.CLIP:
    """Return the demo's model in float32 with the weights of ``checkpoint``, untrained for None."""
    model = open_clip.CLIP(**copy.deepcopy(CONFIG))
    if checkpoint is not None:
        weights = {name: value.float() for name, value in read_weights(checkpoint).items()}
        if "logit_scale" in weights:
            weights["logit_scale"] = weights["logit_scale"].reshape(model.logit_scale.shape)
        model.load_state_dict(weights)
    return model


def load(checkpoint: Path | None) -> nn.Module:
    """Return the model, with the shipped weights unless ``checkpoint`` names others."""
    return demo_model(checkpoint or CHECKPOINT)


def demo_architecture() -> Architecture:
    """Return what a file of the model's weights says about them."""
    size = CONFIG["vision_cfg"]["image_size"]
    return Architecture(NAME, CONFIG, PictureFormat(size, tuple(PIXEL_MEAN), tuple(PIXEL_STD)))


register_model(NAME, load, demo_tokenizer, weights=CHECKPOINT, config=CONFIG)
