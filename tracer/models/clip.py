"""CLIP models: loading one with its tokenizer and picture format, and encoding pictures and texts with it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch.nn.functional as F
from torch import Tensor, nn

from tracer.errors import UserError
from tracer.models.picture_format import PictureFormat
from tracer.models.registry import Tokenizer, registered_model, registered_names

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")

MAX_LOGIT_SCALE = (
    100.0  # the bound in CLIP's own training (Radford et al. 2021, arXiv 2103.00020, section 2.5)
)


@dataclass
class Clip:
    """A dual encoder with the tokenizer of its texts and the format of its pictures.

    Attributes:
        name: the name under which it was loaded; for a model config (.json) the name of the file.
        model: an ``open_clip.CLIP`` or one of its relatives, which share no base class.
        tokenizer: maps n strings to int64 tokens [n, context].
        picture_format: size, resizing and normalisation of the pictures.
    """

    name: str
    model: Any
    tokenizer: Tokenizer
    picture_format: PictureFormat


def load_clip(name: str, pretrained: str | None) -> Clip:
    """Build the model ``name`` with the weights ``pretrained``.

    Args:
        name: a registered model, an open_clip name, ``local-dir:<folder>``, ``hf-hub:<name>``, or the path of
            a model config (.json).
        pretrained: a tag of open_clip or the path of a checkpoint; None means random weights, or for a
            registered model its own.

    Raises:
        UserError: the model or the tag is unknown, the checkpoint is missing or does not fit, the weights
            cannot be downloaded, or the picture format is not supported.
    """
    if pretrained and Path(pretrained).suffix in CHECKPOINT_SUFFIXES and not Path(pretrained).is_file():
        raise UserError(f"checkpoint '{pretrained}' does not exist: check --pretrained")
    if registered_model(name):
        model, tokenizer = _load_registered(name, pretrained)
    else:
        if name.endswith(".json"):
            name = _add_model_config(Path(name))
        _check_names(name, pretrained)
        model, tokenizer = _load_open_clip(name, pretrained)
    return Clip(name, model, tokenizer, _picture_format(name, model))


def weights_file(name: str, pretrained: str | None) -> Path | None:
    """Return the local file from which :func:`load_clip` reads the weights; None for a tag of open_clip."""
    if pretrained:
        return Path(pretrained) if Path(pretrained).is_file() else None
    registered = registered_model(name)
    return registered.weights if registered else None


def _load_registered(name: str, pretrained: str | None) -> tuple[nn.Module, Tokenizer]:
    registered = registered_model(name)
    assert registered is not None  # load_clip asked
    if pretrained and not Path(pretrained).is_file():
        raise UserError(
            f"{name} has no pretrained tags, and '{pretrained}' is not a local file: give --pretrained a "
            f".safetensors file, or null for the weights shipped with it"
        )
    try:
        return registered.load(Path(pretrained) if pretrained else None)
    except Exception as error:  # safetensors and torch raise several kinds for a file that does not fit
        raise _not_loadable(name, pretrained, error) from error


def _add_model_config(path: Path) -> str:
    """Add the model config in a JSON file to those of open_clip, and return its name: the file's stem."""
    if not path.is_file():
        raise UserError(f"model config '{path}' does not exist: check --model")
    # Checked before open_clip sees it: open_clip would read a broken file again for every later model.
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"model config '{path}' is not JSON in UTF-8: {error}: check --model") from error
    if not isinstance(settings, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= settings.keys():
        raise UserError(f"model config '{path}' must hold embed_dim, vision_cfg and text_cfg: check --model")
    open_clip.add_model_config(path)
    return path.stem


def _check_names(name: str, pretrained: str | None) -> None:
    """Raise UserError for a model or a tag that open_clip does not know."""
    models = open_clip.list_models()
    if name not in models and not name.startswith(("hf-hub:", "local-dir:")):
        similar = [model for model in models if model.lower().startswith(name.lower()[:5])]
        registered = "".join(f"{other}, " for other in registered_names())
        raise UserError(
            f"unknown model '{name}': use an open_clip name (such as {', '.join(similar[:4]) or 'ViT-B-32'}), "
            f"{registered}local-dir:<folder>, hf-hub:<name>, or the path of a model config (.json)"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained and not Path(pretrained).is_file() and ":" not in name and pretrained not in tags:
        raise UserError(
            f"'{pretrained}' is neither a local file nor a pretrained tag of {name} "
            f"(its tags: {', '.join(tags) or 'none'}): check --pretrained"
        )


def _load_open_clip(name: str, pretrained: str | None) -> tuple[nn.Module, Tokenizer]:
    try:
        # A logit scale with one dimension: DeepSpeed cannot broadcast a parameter that has none.
        model = open_clip.create_model(name, pretrained=pretrained, nonscalar_logit_scale=True)
        return model, open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip raises many kinds, from network errors to shapes that do not fit
        raise _not_loadable(name, pretrained, error) from error


def _not_loadable(name: str, pretrained: str | None, error: Exception) -> UserError:
    reason = textwrap.shorten(str(error), 200, placeholder=" …") or type(error).__name__
    return UserError(
        f"model '{name}' with weights '{pretrained}' cannot be loaded: {reason}: check --model and --pretrained"
    )


def _picture_format(name: str, model: nn.Module) -> PictureFormat:
    """Read the picture format off a model; UserError for one that the data pipeline cannot make."""
    wanted = open_clip.get_model_preprocess_cfg(model)
    size = wanted["size"]
    height, width = (size, size) if isinstance(size, int) else size
    mode, interpolation = wanted.get("resize_mode", "shortest"), wanted.get("interpolation", "bicubic")
    if height != width or mode not in ("shortest", "squash") or interpolation not in ("bicubic", "bilinear"):
        raise UserError(
            f"model '{name}' wants pictures of {height}×{width} pixels, resize mode {mode}, {interpolation}: "
            "only square ones, shortest or squash, bicubic or bilinear are supported"
        )
    return PictureFormat(
        size=height,
        mean=tuple(wanted.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(wanted.get("std") or open_clip.OPENAI_DATASET_STD),
        interpolation=interpolation,
        resize_mode=mode,
    )


class Features(NamedTuple):
    """What a dual encoder computes for N pictures and M texts, in float32.

    ``image`` [N, D] and ``text`` [M, D] are L2-normalised; ``logit_scale`` is σ, exponentiated, a scalar.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor


def encode(forward: Callable[..., Any], image: Tensor, text: Tensor) -> Features:
    """Return the features of pictures and texts, in float32, with σ bounded by ``MAX_LOGIT_SCALE``.

    The bound changes the value of σ and not its gradient, so that training can bring σ back below it (CLIP's
    published weights start on the bound).

    Args:
        forward: an open_clip model, or any call with the same results: a tuple that begins with image features,
            text features and logit scale, or a dictionary of them.
        image: pictures [N, 3, S, S].
        text: tokens [M, context].
    """
    output = forward(image, text)
    if isinstance(output, dict):
        output = output["image_features"], output["text_features"], output["logit_scale"]
    u, v, scale = output[:3]
    scale = scale.float().squeeze()
    bounded = scale + (scale.clamp(max=MAX_LOGIT_SCALE) - scale).detach()
    return Features(F.normalize(u.float(), dim=-1), F.normalize(v.float(), dim=-1), bounded)


def projections(model: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return the projections into the shared space, Wv [image width, D] and Wt [text width, D].

    None where a tower has no such matrix (a ResNet's attention pooling, some timm towers).
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
