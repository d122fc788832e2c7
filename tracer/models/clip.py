"""An open_clip model with its tokenizer and picture format: by tag, by local file, or registered by name."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch.nn.functional as F
from torch import Tensor, nn

from tracer.errors import UserError

CHECKPOINTS = (".pt", ".pth", ".bin", ".safetensors")

MAX_LOGIT_SCALE = 100.0  # as in CLIP's own training


@dataclass
class Clip:
    """A dual encoder and what feeds it.

    ``tokenizer`` maps a list of strings to int64 tokens [n, context]. Pictures are RGB, resized to
    ``image_size`` pixels (``squash``: both sides; otherwise the shorter one, and the centre is cropped) with
    ``interpolation``, bicubic or bilinear, scaled to [0, 1], then normalised with ``mean`` and ``std``.
    """

    name: str
    model: Any  # open_clip.CLIP or one of its relatives, which share no base class
    tokenizer: Callable[[list[str]], Tensor]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    squash: bool = False


def load_clip(name: str, pretrained: str | None) -> Clip:
    """Build the model ``name`` and load the weights ``pretrained`` (an open_clip tag or a local file).

    Raises:
        UserError: unknown model or tag, missing or unfitting checkpoint, weights that cannot be fetched.
    """
    if pretrained and Path(pretrained).suffix in CHECKPOINTS and not Path(pretrained).is_file():
        raise UserError(f"checkpoint '{pretrained}' does not exist: check --pretrained")
    if name in REGISTERED:
        return _load_registered(name, pretrained)
    if name.endswith(".json"):
        name = _register(Path(name))
    known = name in open_clip.list_models() or name.startswith(("hf-hub:", "local-dir:"))
    if not known:
        near = [m for m in open_clip.list_models() if m.lower().startswith(name.lower()[:5])]
        raise UserError(
            f"unknown model '{name}': use an open_clip name (such as {', '.join(near[:4]) or 'ViT-B-32'}), "
            "tracer-demo, local-dir:<folder>, hf-hub:<name>, or the path of a model config (.json)"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained and not Path(pretrained).is_file() and ":" not in name and pretrained not in tags:
        raise UserError(
            f"'{pretrained}' is neither a local file nor a pretrained tag of {name} "
            f"(its tags: {', '.join(tags) or 'none'}): check --pretrained"
        )
    try:
        # A logit scale with one dimension: DeepSpeed cannot broadcast a parameter with none.
        model = open_clip.create_model(name, pretrained=pretrained, nonscalar_logit_scale=True)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip raises many kinds; each means that this start cannot be had
        raise _unloadable(name, pretrained, error) from error
    return _with_picture_format(name, model, tokenizer)


@dataclass(frozen=True)
class Registered:
    """A model that open_clip does not know: what builds it and its tokenizer, and its own weights."""

    load: Callable[[Path | None], tuple[nn.Module, Callable[[list[str]], Tensor]]]
    weights: Path


REGISTERED: dict[str, Registered] = {}


def register_model(
    name: str, load: Callable[[Path | None], tuple[nn.Module, Callable[[list[str]], Tensor]]], weights: Path
) -> None:
    """Make :func:`load_clip` know ``name``; ``load`` gets a checkpoint's path, or None for ``weights``."""
    REGISTERED[name] = Registered(load, weights)


def _load_registered(name: str, checkpoint: str | None) -> Clip:
    if checkpoint and not Path(checkpoint).is_file():
        raise UserError(
            f"{name} has no pretrained tags, and '{checkpoint}' is no local file: give --pretrained a "
            f".safetensors file, or null for the weights shipped with it"
        )
    try:
        model, tokenizer = REGISTERED[name].load(Path(checkpoint) if checkpoint else None)
    except Exception as error:  # safetensors and torch raise several kinds for a file that does not fit
        raise _unloadable(name, checkpoint, error) from error
    return _with_picture_format(name, model, tokenizer)


def weights_file(name: str, pretrained: str | None) -> Path | None:
    """The local file that :func:`load_clip` reads the weights from; None for an open_clip tag."""
    if pretrained:
        return Path(pretrained) if Path(pretrained).is_file() else None
    return REGISTERED[name].weights if name in REGISTERED else None


def _unloadable(name: str, pretrained: str | None, error: Exception) -> UserError:
    reason = textwrap.shorten(str(error), 200, placeholder=" …") or type(error).__name__
    return UserError(
        f"model '{name}' with weights '{pretrained}' cannot be loaded: {reason}: check --model and --pretrained"
    )


def _with_picture_format(name: str, model: nn.Module, tokenizer: Callable[[list[str]], Tensor]) -> Clip:
    picture = open_clip.get_model_preprocess_cfg(model)
    size = picture["size"]
    height, width = (size, size) if isinstance(size, int) else size
    mode, interpolation = picture.get("resize_mode", "shortest"), picture.get("interpolation", "bicubic")
    if height != width or mode not in ("shortest", "squash") or interpolation not in ("bicubic", "bilinear"):
        raise UserError(
            f"model '{name}' wants pictures of {height}×{width} pixels, resize mode {mode}, {interpolation}: "
            "only square ones, shortest or squash, bicubic or bilinear are supported"
        )
    return Clip(
        name=name,
        model=model,
        tokenizer=tokenizer,
        image_size=height,
        mean=tuple(picture.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(picture.get("std") or open_clip.OPENAI_DATASET_STD),
        interpolation=interpolation,
        squash=mode == "squash",
    )


def _register(path: Path) -> str:
    """Make open_clip know the model config in a JSON file; its name is the file's."""
    if not path.is_file():
        raise UserError(f"model config '{path}' does not exist: check --model")
    try:  # before open_clip does: a broken file that it knows, it reads again for every other one
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # what JSON and UTF-8 both raise
        raise UserError(f"model config '{path}' is no JSON in UTF-8: {error}: check --model") from error
    if not isinstance(settings, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= settings.keys():
        raise UserError(f"model config '{path}' must hold embed_dim, vision_cfg and text_cfg: check --model")
    open_clip.add_model_config(path)
    return path.stem


def encode(forward: Callable[..., Any], image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised features u [N, D], v [N, D] and the logit scale σ ≤ 100 (a scalar) of any open_clip model.

    All in float32. The bound on σ keeps its gradient, so that σ can come back from it (CLIP's own weights
    start there).
    """
    output = forward(image, text)
    if isinstance(output, dict):
        output = output["image_features"], output["text_features"], output["logit_scale"]
    u, v, scale = output[:3]
    scale = scale.float().squeeze()
    bounded = scale + (scale.clamp(max=MAX_LOGIT_SCALE) - scale).detach()
    return F.normalize(u.float(), dim=-1), F.normalize(v.float(), dim=-1), bounded


def projections(model: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The two projection matrices into the shared space, Wv [width_v, D] and Wt [width_t, D].

    None where a tower has none (a ResNet's attention pooling, some timm towers).
    """
    visual = getattr(getattr(model, "visual", None), "proj", None)
    text = getattr(model, "text_projection", None)
    if text is None:
        text = getattr(getattr(model, "text", None), "text_projection", None)
    matrices = []
    for matrix in (visual, text):
        if isinstance(matrix, nn.Linear):
            matrix = matrix.weight.T
        if not isinstance(matrix, Tensor):
            return None
        matrices.append(matrix)
    return matrices[0], matrices[1]
