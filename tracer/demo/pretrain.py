"""Train the small CLIP that the demo starts from."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from tracer.demo.benchmark import _benchmark_pictures
from tracer.demo.config import PretrainConfig
from tracer.demo.packages import download
from tracer.demo.small_clip import demo_model, demo_tokenizer
from tracer.demo.split import ANY_CLASS_ALIKE, SAME_CLASS_ALIKE, fingerprints
from tracer.demo.themes import (
    HANDS,
    MORE_HANDS,
    TRAIN_FAMILY,
    Drawing,
    captions,
    class_of,
    on_paper,
    read_classes,
    read_themes,
    render_all,
)
from tracer.errors import UserError
from tracer.files import whole_file
from tracer.models.clip import MAX_LOGIT_SCALE
from tracer.models.weights import save_weights
from tracer.ops import contrastive_loss
from tracer.train.engine import parameter_groups
from tracer.train.log import trim_log


@dataclass
class Corpus:
    """Pictures to pretrain on: ``pictures`` premultiplied RGBA [n, S, S, 4] uint8, ``captions`` [n] lists,
    ``labels`` [n] int64 (pictures of one name share one), ``named`` [n] bool: of a benchmark class.
    """

    pictures: np.ndarray
    captions: list[list[str]]
    labels: np.ndarray
    named: np.ndarray


def pretraining_pictures(folder: Path, size: int, workers: int = 2) -> Corpus:
    """All drawings of all hands whose name two hands know, without the benchmark's own pictures.

    Left out: the test pictures and whatever looks like one; the training pictures, so that fine-tuning has
    something to learn; drawings that stand for two classes. About 250 MB are downloaded to ``packages`` below
    ``folder``.
    """
    hands = HANDS | MORE_HANDS
    files = download(sorted({package for package, _ in hands.values()}), folder / "packages")
    drawings = read_themes(files, hands, workers)
    return corpus(drawings, *read_classes(), size=size, workers=workers)


def corpus(
    drawings: list[Drawing],
    classes: dict[str, str],
    phrases: dict[str, list[str]],
    *,
    size: int,
    workers: int = 2,
) -> Corpus:
    """See :func:`pretraining_pictures`."""
    p = _benchmark_pictures(drawings, classes, workers)
    own = {d.path for d in drawings if d.hand in HANDS and class_of(d, classes)}
    kept = {d.path for d, test, family in zip(p.drawings, p.test, p.families, strict=True)
            if not test and family != TRAIN_FAMILY}  # fmt: skip
    hands_of: dict[str, set[str]] = defaultdict(set)
    for d in drawings:
        hands_of[d.name].add(d.hand)
    pool = [
        d
        for d in drawings
        if (d.path in kept if d.path in own else len(hands_of[d.name]) > 1 or class_of(d, classes))
    ]
    pool, rgba = render_all(pool, workers)
    labels = [class_of(d, classes) for d in pool]

    prints, test_prints = fingerprints(on_paper(rgba)), p.prints[p.test]
    test_labels, near = p.labels[p.test], np.zeros(len(pool), bool)
    for start in range(0, len(pool), 2048):
        same = np.array(labels[start : start + 2048], dtype=object)[:, None] == test_labels[None]
        limit = np.where(same, SAME_CLASS_ALIKE, ANY_CLASS_ALIKE)
        near[start : start + 2048] = (prints[start : start + 2048] @ test_prints.T > limit).any(1)
    keep = np.flatnonzero(~near)

    known = set(hands_of)
    titles = [labels[i] or pool[i].name for i in keep]
    number = {title: n for n, title in enumerate(sorted(set(titles)))}
    return Corpus(
        pictures=np.stack([_premultiplied(rgba[i], size) for i in keep]),
        captions=[captions(pool[i], labels[i], phrases.get(labels[i], ()), known) for i in keep],
        labels=np.array([number[title] for title in titles]),
        named=np.array([bool(labels[i]) for i in keep]),
    )


def _premultiplied(rgba: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(rgba).convert("RGBa").resize((size, size), Image.Resampling.BOX))


def pretrain(config: PretrainConfig) -> Path:
    """Train for ``config.minutes`` and return the path of the weights (float16 safetensors).

    Called again with the same output, a run that was cut off goes on from its last checkpoint.

    Raises:
        UserError: settings that make no sense or differ from the checkpoint's, packages that cannot be had,
            an output that is finished.
    """
    config.validate()
    done = config.output / "model.safetensors"
    if done.exists():
        raise UserError(f"'{done}' exists: choose another --output or remove it")
    model = demo_model(None)
    size = model.visual.image_size
    corpus = pretraining_pictures(config.data, size[0] if isinstance(size, tuple) else size, config.workers)
    return fit(config, corpus)


def fit(config: PretrainConfig, corpus: Corpus) -> Path:
    """The training itself; see :func:`pretrain`."""
    torch.manual_seed(config.seed)
    model = demo_model(None).train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=(0.9, 0.98)
    )
    draw = torch.Generator().manual_seed(config.seed)
    step, elapsed = _resume(config, model, optimizer, draw)
    trim_log(config.output / "log.jsonl", step)

    pictures = torch.from_numpy(np.ascontiguousarray(corpus.pictures.transpose(0, 3, 1, 2)))
    labels, captions = torch.from_numpy(corpus.labels), Captions(corpus.captions)
    chance = torch.where(torch.from_numpy(corpus.named), config.named, 1.0)
    budget, started, saved = 60 * config.minutes, monotonic() - elapsed, elapsed
    config.output.mkdir(parents=True, exist_ok=True)
    with (
        tqdm(total=round(budget), initial=round(elapsed), desc="pretraining", unit="s") as bar,
        (config.output / "log.jsonl").open("a") as log,
    ):
        while elapsed < budget:
            rate = learning_rate(elapsed / budget, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * rate
            rows = torch.multinomial(chance, config.batch_size, generator=draw)
            image, text = augment(pictures[rows], draw), captions.draw(rows, draw)
            # For so few tokens the CPU's fused attention takes far longer than the plain matrix products.
            with (
                sdpa_kernel(SDPBackend.MATH),
                torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"),
            ):
                u, v = model.encode_image(image), model.encode_text(text)
            u, v = F.normalize(u.float(), dim=-1), F.normalize(v.float(), dim=-1)
            loss = contrastive_loss(u, v, model.logit_scale.exp(), labels=labels[rows]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

            step, elapsed = step + 1, monotonic() - started
            bar.update(min(round(elapsed), round(budget)) - bar.n)
            if step % 20 == 0:
                bar.set_postfix(step=step, loss=f"{loss.item():.3f}")
                log.write(json.dumps({"step": step, "seconds": elapsed, "loss": loss.item()}) + "\n")
                log.flush()
            if elapsed - saved > 60 * config.save_every:
                saved = elapsed
                _checkpoint(config, model, optimizer, draw, step, elapsed)
    weights = {name: value.half() for name, value in model.state_dict().items()}
    save_weights(weights, config.output / "model.safetensors")
    (config.output / "resume.pt").unlink(missing_ok=True)
    return config.output / "model.safetensors"


def learning_rate(progress: float, warmup: float) -> float:
    """Share of the peak rate: cosine from 1 to 0 over the budget, and a linear rise over its share ``warmup``."""
    return max(min(progress / warmup, 0.5 * (1 + math.cos(math.pi * progress))), 1e-3)


def _checkpoint(
    config: PretrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    draw: torch.Generator,
    step: int,
    elapsed: float,
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "draw": draw.get_state(),
        "step": step,
        "elapsed": elapsed,
        "settings": _fixed(config),
    }
    with whole_file(config.output / "resume.pt") as part:
        torch.save(state, part)


def _resume(
    config: PretrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, draw: torch.Generator
) -> tuple[int, float]:
    """Load the last checkpoint, if there is one; returns the steps and the seconds done.

    Raises:
        UserError: it was made with other settings.
    """
    path = config.output / "resume.pt"
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    for name, value in _fixed(config).items():
        if (before := state.get("settings", {}).get(name)) != value:
            raise UserError(
                f"'{path}' was made with --{name} {before}, not {value}: give the same, remove it to start "
                "anew, or choose another --output"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    draw.set_state(state["draw"])
    return state["step"], state["elapsed"]


def _fixed(config: PretrainConfig) -> dict[str, int | float | str]:
    """The settings that a run cannot change half-way."""
    free = ("data", "output", "minutes", "save_every", "workers")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in free}


class Captions:
    """The tokens of several captions per picture, of which :meth:`draw` takes one at random."""

    def __init__(self, captions: list[list[str]]):
        unique = sorted({text for several in captions for text in several})
        number = {text: n for n, text in enumerate(unique)}
        self.tokens = demo_tokenizer()(unique)
        self.of = torch.tensor([number[text] for several in captions for text in several])
        self.first = torch.tensor(np.cumsum([0] + [len(several) for several in captions]))

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens [B, context] of one caption for each of the pictures ``rows`` [B]."""
        start, count = self.first[rows], self.first[rows + 1] - self.first[rows]
        return self.tokens[self.of[start + (torch.rand(len(rows), generator=generator) * count).long()]]


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Premultiplied RGBA [B, 4, S, S] uint8 → normalised RGB [B, 3, S, S] float32, randomly placed and coloured.

    Never mirrored: left and right are what many icons are about.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(pictures), *shape, generator=generator)

    def sometimes(share: float) -> Tensor:
        return (uniform(0, 1, 1, 1, 1) < share).float()

    x = pictures.float() / 255
    pale = x[:, :3].mean((1, 2, 3)) > 0.78 * x[:, 3].mean((1, 2))

    # 1. turn, zoom, stretch and shift, about as much as one hand differs from another
    angle, zoom, stretch = uniform(-0.15, 0.15), uniform(-0.12, 0.25).exp(), uniform(-0.08, 0.08).exp()
    cos, sin, shift = angle.cos(), angle.sin(), uniform(-0.12, 0.12, 2)
    rows = (zoom * stretch * cos, -zoom * sin, shift[:, 0], zoom * sin, zoom / stretch * cos, shift[:, 1])
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)

    # 2. paper: as in the benchmark, or tinted; always one on which the ink can be seen
    plain = torch.where(pale, 80 / 255, 1.0)[:, None].expand(-1, 3)
    tinted = torch.where(pale[:, None], uniform(0.1, 0.5, 3), uniform(0.7, 1.0, 3))
    paper = torch.where(uniform(0, 1, 1) < 0.5, plain, tinted)
    x = x[:, :3] + (1 - x[:, 3:]) * paper[:, :, None, None]

    # 3. hue (mixed with a permutation of the channels), saturation, contrast and brightness
    turned = x[:, torch.randperm(3, generator=generator)]
    x = x.lerp(turned, uniform(0, 1, 1, 1, 1) * sometimes(0.25))
    x = x.lerp(x.mean(1, keepdim=True), uniform(0, 1.4, 1, 1, 1).clamp(max=1) * sometimes(0.4))
    x = 0.5 + (x - 0.5) * uniform(0.7, 1.15, 1, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1)

    mean, std = torch.tensor(OPENAI_DATASET_MEAN), torch.tensor(OPENAI_DATASET_STD)
    return (x.clamp(0, 1) - mean[:, None, None]) / std[:, None, None]
