"""Run open_clip's own training script with the fused loss in place of open_clip's.

    python examples/open_clip_training.py --model ViT-B-32 --train-data pairs.csv ...
    python examples/open_clip_training.py --tiny runs/tiny

The first form takes every option of ``python -m open_clip_train.main``. The second needs no data: it draws
a few pictures, writes the config of a tiny model and trains it for two epochs on the CPU.

open_clip's script obtains its loss from ``create_loss``, and this example replaces only that function. The
script needs open_clip's training extras: pip install webdataset pandas.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip
import open_clip_train.main as open_clip_script
from PIL import Image, ImageDraw
from torch import nn

from tracer.losses import ClipLoss, SigLipLoss

TINY_MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def create_loss(args: argparse.Namespace) -> nn.Module:
    """Return the fused loss for the options of open_clip's script, as ``open_clip.create_loss`` does.

    Raises:
        SystemExit: the options ask for a loss that is none of both.
    """
    if args.distill or "coca" in args.model.lower():
        raise SystemExit(
            "error: this example has open_clip's CLIP and SigLIP losses: no --distill-…, no CoCa"
        )
    if args.siglip:
        return SigLipLoss(
            cache_labels=True, rank=args.rank, world_size=args.world_size, dist_impl=args.loss_dist_impl
        )
    return ClipLoss(
        local_loss=args.local_loss,
        gather_with_grad=args.gather_with_grad,
        cache_labels=True,
        rank=args.rank,
        world_size=args.world_size,
        use_horovod=args.horovod,
    )


def train(argv: Sequence[str], loss: Callable[[argparse.Namespace], nn.Module] = create_loss) -> None:
    """Run open_clip's script with the options ``argv`` and the loss that ``loss`` creates."""
    original = open_clip_script.create_loss
    open_clip_script.create_loss = loss
    try:
        open_clip_script.main(list(argv))
    finally:
        open_clip_script.create_loss = original


def tiny_run(folder: Path, name: str = "tracer") -> list[str]:
    """Draw 64 pictures, write a model config, and return the options that train this model on them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "tiny-clip.json"
    config.write_text(json.dumps(TINY_MODEL))
    open_clip.add_model_config(config)
    with (folder / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filepath", "title"])
        for n in range(64):
            shape, colour = ("circle", "square")[n % 2], ("red", "green", "blue", "black")[n // 2 % 4]
            picture = Image.new("RGB", (32, 32), "white")
            draw = ImageDraw.Draw(picture)
            box = (4 + n % 5, 4, 24 + n % 5, 26)
            (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
            picture.save(folder / f"{n:02d}.png")
            rows.writerow([str(folder / f"{n:02d}.png"), f"a {colour} {shape}, drawing {n}"])
    options = {
        "--model": config.stem,
        "--train-data": folder / "pairs.csv",
        "--dataset-type": "csv",
        "--csv-separator": ",",
        "--batch-size": 16,
        "--epochs": 2,
        "--warmup": 2,
        "--lr": 1e-3,
        "--workers": 0,
        "--device": "cpu",
        "--precision": "fp32",
        "--log-every-n-steps": 1,
        "--logs": folder / "logs",
        "--name": name,
        "--seed": 0,
    }
    return [str(word) for option in options.items() for word in option]


def main(argv: Sequence[str]) -> None:
    """Run open_clip's script with ``argv``, or the tiny run if ``argv`` begins with ``--tiny``."""
    if argv[:1] == ["--tiny"]:
        argv = tiny_run(Path(argv[1] if len(argv) > 1 else "runs/open_clip_tiny").resolve())
    train(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
