"""Train the small CLIP that the demo starts from."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from tracer.demo.augment import augment
from tracer.demo.config import PretrainConfig
from tracer.demo.corpus import Corpus, download_corpus
from tracer.demo.small_clip import demo_architecture, demo_model, demo_tokenizer
from tracer.errors import Stopped, UserError
from tracer.files import check_folder, claim_folder, whole_file
from tracer.models.weights import MAX_LOGIT_SCALE, first_not_finite, save_weights
from tracer.ops import contrastive_loss
from tracer.train.engine import parameter_groups
from tracer.train.log import trim_log
from tracer.train.stop import stop_requests

MAX_SKIPPED = 10  # steps in a row without a finite loss and gradient, after which the training stops


def pretrain(config: PretrainConfig) -> Path:
    """Train for ``config.minutes`` and return the path of the weights (float16 safetensors).

    Called again with the same output, it resumes an interrupted run from its last checkpoint.

    Raises:
        UserError: invalid settings, settings that differ from the checkpoint's, a package that cannot be
            downloaded, or an output that already holds a finished run.
    """
    config.validate()
    check_folder(config.output)  # before the work, which takes long
    done = config.output / "model.safetensors"
    if done.exists():
        raise UserError(f"'{done}' exists: choose another --output or remove it")
    claim_folder(config.output)
    model = demo_model(None)
    size = model.visual.image_size
    corpus = download_corpus(config.data, size[0] if isinstance(size, tuple) else size, config.workers)
    return fit(config, corpus)


def fit(config: PretrainConfig, corpus: Corpus) -> Path:
    """Train on ``corpus`` and return the path of the weights; see :func:`pretrain`."""
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
    skipped = 0
    with (
        tqdm(total=round(budget), initial=round(elapsed), desc="pretraining", unit="s") as bar,
        (config.output / "log.jsonl").open("a") as log,
        stop_requests() as request,
    ):
        while elapsed < budget:
            rate = learning_rate(elapsed / budget, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * rate
            rows = torch.multinomial(chance, config.batch_size, generator=draw)
            image, text = augment(pictures[rows], draw), captions.draw(rows, draw)
            loss = batch_loss(model, image, text, labels[rows], config.precision)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            finite = bool((norm + loss.detach()).isfinite())
            if finite:
                optimizer.step()
            optimizer.zero_grad()
            skipped = 0 if finite else skipped + 1
            if skipped == MAX_SKIPPED:
                raise UserError(
                    f"the loss or its gradient was not finite in {skipped} steps in a row, the last is step "
                    f"{step + 1}: lower --lr and remove '{config.output}' to start anew"
                )
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

            step, elapsed = step + 1, monotonic() - started
            bar.update(min(round(elapsed), round(budget)) - bar.n)
            if step % 20 == 0 and finite:
                bar.set_postfix(step=step, loss=f"{loss.item():.3f}")
                log.write(
                    json.dumps({"step": step, "seconds": elapsed, "loss": loss.item()}, allow_nan=False)
                    + "\n"
                )
                log.flush()
            if elapsed - saved > 60 * config.save_every or request.signal:
                saved = elapsed
                _checkpoint(config, model, optimizer, draw, step, elapsed)
            if request.signal:
                raise Stopped(
                    f"stopped after step {step}, which is saved; the same command goes on from there",
                    request.signal,
                    saved=True,
                )
    weights = {name: value.half() for name, value in model.state_dict().items()}
    if first_not_finite(weights) is not None:
        raise UserError(
            f"the weights are not finite in float16: lower --lr and remove '{config.output}' to start anew"
        )
    save_weights(weights, config.output / "model.safetensors", demo_architecture().metadata())
    (config.output / "resume.pt").unlink(missing_ok=True)
    return config.output / "model.safetensors"


def batch_loss(model: Any, image: Tensor, text: Tensor, labels: Tensor, precision: str) -> Tensor:
    """Return the contrastive loss of a batch: images [B, 3, S, S], tokens [B, context], labels [B].

    ``model`` is an ``open_clip.CLIP``.
    """
    # For so few tokens the CPU's fused attention takes far longer than plain matrix products.
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        u, v = model.encode_image(image), model.encode_text(text)
    u, v = F.normalize(u.float(), dim=-1), F.normalize(v.float(), dim=-1)
    return contrastive_loss(u, v, model.logit_scale.exp(), labels=labels).loss


def learning_rate(progress: float, warmup: float) -> float:
    """Return the rate as a share of its peak: a linear rise over ``warmup``, else a cosine from 1 to 0."""
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
    """Load the last checkpoint, if there is one, and return the steps and the seconds done.

    Raises:
        UserError: the checkpoint was made with other settings.
    """
    path = config.output / "resume.pt"
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    for name, value in _fixed(config).items():
        if (before := state.get("settings", {}).get(name)) != value:
            raise UserError(
                f"'{path}' was made with --{name} {before}, not {value}: give the same value, remove the file to "
                "start anew, or choose another --output"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    draw.set_state(state["draw"])
    return state["step"], state["elapsed"]


def _fixed(config: PretrainConfig) -> dict[str, int | float | str]:
    """Return the settings that a resumed run must share with the checkpoint."""
    free = ("data", "output", "minutes", "save_every", "workers")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in free}


class Captions:
    """Holds the tokens of each picture's captions; :meth:`draw` takes one at random."""

    def __init__(self, captions: list[list[str]]):
        unique = sorted({text for several in captions for text in several})
        number = {text: n for n, text in enumerate(unique)}
        self.tokens = demo_tokenizer()(unique)
        self.of = torch.tensor([number[text] for several in captions for text in several])
        self.first = torch.tensor(np.cumsum([0] + [len(several) for several in captions]))

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Return tokens [B, context] of one caption for each of the pictures ``rows`` [B]."""
        start, count = self.first[rows], self.first[rows + 1] - self.first[rows]
        return self.tokens[self.of[start + (torch.rand(len(rows), generator=generator) * count).long()]]
