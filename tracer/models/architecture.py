"""The architecture of a model, as a file of its weights describes it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from tracer._checks import CONTRASTS
from tracer.errors import UserError
from tracer.models.picture_format import PictureFormat
from tracer.models.registry import registered_model
from tracer.models.weights import read_metadata

BUILT_IN = frozenset(open_clip.list_models())  # open_clip's own models, before the user adds configs

# Settings of a model config that train a model otherwise and change nothing in what given weights compute.
WITHOUT_EFFECT = {
    "init_logit_scale",
    "init_logit_bias",
    "vision_cfg.patch_dropout",
    "vision_cfg.timm_drop",
    "vision_cfg.timm_drop_path",
    "vision_cfg.timm_model_pretrained",
    "text_cfg.hf_model_pretrained",
}


class Form(NamedTuple):
    """The form of the contrastive loss of some weights, by which their logits become probabilities.

    Attributes:
        contrast: ``"softmax"`` over the candidates, or ``"sigmoid"`` of each pair.
        logit_bias: b of the sigmoid where it is a fixed number; None where it is one of the weights, as in SigLIP
            models, and for softmaxes, which no bias changes.
    """

    contrast: str = "softmax"
    logit_bias: float | None = None

    def __str__(self) -> str:
        fixed = "" if self.logit_bias is None else f" with a bias of {self.logit_bias:g}"
        return f"the {self.contrast}{fixed}"


@dataclass(frozen=True)
class Architecture:
    """All that the tensors of a model do not say by themselves.

    Attributes:
        model: the name of the model.
        config: open_clip's model config of it, as built; None for a registered model that has none.
        picture_format: the format of its pictures.
        form: of the loss that the weights were trained with; None where nobody said.
    """

    model: str
    config: dict[str, Any] | None
    picture_format: PictureFormat
    form: Form | None = None

    def metadata(self) -> dict[str, str]:
        """Return the strings by which the header of a safetensors file describes the architecture.

        ``model_cfg`` and ``preprocess_cfg`` are JSON, with the names and the content that they have in open_clip's
        ``open_clip_config.json``; ``activation`` is ``quick_gelu`` or ``gelu``; ``contrast`` and ``logit_bias``
        are those of :class:`Form`.
        """
        described = {
            "format": "pt",
            "model": self.model,
            "preprocess_cfg": json.dumps(asdict(self.picture_format)),
        }
        if self.config is not None:
            described["activation"] = "quick_gelu" if self.config.get("quick_gelu") else "gelu"
            described["model_cfg"] = json.dumps(self.config)
        if self.form is not None:
            described["contrast"] = self.form.contrast
            if self.form.logit_bias is not None:
                described["logit_bias"] = repr(self.form.logit_bias)
        return described


def saved_architecture(path: Path) -> Architecture | None:
    """Return the architecture that a file of weights describes; None for a file that describes none.

    Raises:
        UserError: the description is damaged.
    """
    metadata = read_metadata(path)
    if "preprocess_cfg" not in metadata:
        return None
    try:
        pictures = json.loads(metadata["preprocess_cfg"])
        pictures |= {"mean": tuple(pictures["mean"]), "std": tuple(pictures["std"])}
        config = json.loads(metadata["model_cfg"]) if "model_cfg" in metadata else None
        return Architecture(metadata["model"], config, PictureFormat(**pictures), _form(metadata))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the header of '{path}' describes no architecture ({error}): write the file again"
        ) from error


def one_form(forms: Mapping[str, Form]) -> Form:
    """Return the form that all weights have whose average is made.

    Args:
        forms: name of each of the weights → its form.

    Raises:
        UserError: they have several; names two.
    """
    (name, form), *others = forms.items()
    for other, another in others:
        if another != form:
            raise UserError(
                f"'{name}' was trained with {form} and '{other}' with {another}: their average would be neither: "
                "average weights of one --contrast and --logit_bias"
            )
    return form


def _form(metadata: dict[str, str]) -> Form | None:
    """Return the form that a header names; None for that of an earlier version or of another program."""
    if "contrast" not in metadata:
        return None
    contrast, bias = metadata["contrast"], metadata.get("logit_bias")
    if contrast not in CONTRASTS:
        raise ValueError(f"contrast is {contrast!r}")
    if bias is not None and not math.isfinite(float(bias)):
        raise ValueError(f"logit_bias is {bias}")
    return Form(contrast, None if bias is None else float(bias))


def refuse_another(path: Path, saved: Architecture, model: str, config: dict[str, Any] | None) -> None:
    """Raise UserError if ``path`` holds weights of another architecture than that of ``model``.

    Args:
        path: of the weights.
        saved: what the file says.
        model, config: name and open_clip's config of the model that shall be built.
    """
    if difference := first_difference(saved, model, config):
        known = saved.model in BUILT_IN or registered_model(saved.model) or ":" in saved.model
        remedy = f"--model {saved.model}" if known else f"--model the config (.json) of {saved.model}"
        raise UserError(
            f"'{path}' holds weights of {saved.model}, not of {model} ({difference}): give {remedy}"
        )


def first_difference(saved: Architecture, model: str, config: dict[str, Any] | None) -> str:
    """Return the first setting in which a file's architecture differs from a model's, in words; empty if none."""
    if saved.config is None or config is None:
        in_file, in_model = {"model": saved.model}, {"model": model}
    else:
        in_file, in_model = _effective(saved.config), _effective(config)
    different = [n for n in sorted(in_file.keys() | in_model.keys()) if in_file.get(n) != in_model.get(n)]
    if not different:
        return ""
    name = different[0]
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    return f"{name} is {in_file.get(name)} in the file and {in_model.get(name)} in the model{more}"


def _effective(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a model config that decide what a model computes, with open_clip's defaults."""
    settings = {"quick_gelu": False, "custom_text": False} | {
        name: value for name, value in config.items() if name not in ("vision_cfg", "text_cfg")
    }
    for tower, defaults in (("vision_cfg", CLIPVisionCfg()), ("text_cfg", CLIPTextCfg())):
        settings |= {f"{tower}.{name}": value for name, value in (asdict(defaults) | config[tower]).items()}
    decisive = {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}
    return json.loads(json.dumps(decisive))  # tuples become lists, as in a file
