"""The demo's small CLIP: its tokenizer, its weights, and its registration as ``tracer-demo``."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import open_clip
from open_clip import tokenizer
from safetensors.torch import load_file
from torch import Tensor, nn

from tracer.demo.packages import ASSETS
from tracer.models.registry import register_model

NAME = "tracer-demo"
CHECKPOINT = ASSETS / "tracer-demo.safetensors"  # the demo's pretrained start

PIXEL_MEAN, PIXEL_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD  # of RGB in [0, 1]


def demo_tokenizer() -> open_clip.SimpleTokenizer:
    """Return open_clip's tokenizer cut to its first merges, which is the vocabulary of the demo's model."""
    config = json.loads((ASSETS / "tracer-demo.json").read_text())["text_cfg"]
    merges = config["vocab_size"] - 2 * 256 - 2  # bytes inside and at the end of words, start and end of text
    lines = gzip.decompress(Path(tokenizer.default_bpe()).read_bytes()).decode("utf-8").split("\n")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "merges.txt.gz"
        path.write_bytes(gzip.compress("\n".join(lines[: 1 + merges]).encode()))
        return tokenizer.SimpleTokenizer(bpe_path=str(path), context_length=config["context_length"])


def demo_model(checkpoint: Path | None = CHECKPOINT) -> open_clip.CLIP:
    """Return the demo's model in float32 with the weights of ``checkpoint``, untrained for None."""
    model = open_clip.CLIP(**json.loads((ASSETS / "tracer-demo.json").read_text()))
    if checkpoint is not None:
        model.load_state_dict({name: value.float() for name, value in load_file(checkpoint).items()})
    return model


def load(checkpoint: Path | None) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    """Return model and tokenizer, with the shipped weights unless ``checkpoint`` names others."""
    return demo_model(checkpoint or CHECKPOINT), demo_tokenizer()


register_model(NAME, load, weights=CHECKPOINT)
