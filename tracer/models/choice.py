"""Which model and which weights a command means: what "auto" stands for, and the weights in a run's folder."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import NamedTuple

import open_clip
from huggingface_hub import constants, try_to_load_from_cache

from tracer.errors import UserError
from tracer.files import cache_folder, whole_file
from tracer.models.architecture import BUILT_IN, Architecture, saved_architecture
from tracer.models.registry import registered_model

DEFAULT_MODEL, DEFAULT_TAG = "ViT-B-16-quickgelu", "openai"

OWN_WEIGHTS = ("local-dir:", "hf-hub:")  # names of models that come with their weights

STUDENT = "student.safetensors"  # of the folder of a run

CONNECT_SECONDS = 5.0


class Choice(NamedTuple):
    """A model's name and its weights, as :func:`tracer.models.clip.load_clip` takes them."""

    model: str
    pretrained: str | None


def choose_model(model: str, pretrained: str | None) -> Choice:
    """Return the model and the weights that two settings mean.

    Args:
        model: the name of a model; auto: the one that the weights name, else ``DEFAULT_MODEL``.
        pretrained: a tag, a file, or the folder of a run, which means the student in it; None; auto: none for a
            model that comes with its weights and for a model config (.json), else ``DEFAULT_TAG``.

    Raises:
        UserError: the folder holds no run; the model has no weights of the tag that auto means.
    """
    if pretrained and Path(pretrained).is_dir():
        pretrained = str(_student_in(Path(pretrained)))
    if model == "auto":
        file = pretrained and pretrained != "auto" and Path(pretrained).is_file()
        saved = saved_architecture(Path(pretrained)) if file and pretrained else None
        model = _name_of(saved, Path(pretrained)) if saved and pretrained else DEFAULT_MODEL
    if pretrained != "auto":
        return Choice(model, pretrained)
    if registered_model(model) or model.startswith(OWN_WEIGHTS) or model.endswith(".json"):
        return Choice(model, None)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if model in open_clip.list_models() and DEFAULT_TAG not in tags:
        named = f"one of {', '.join(tags)}" if tags else "a file of weights"
        raise UserError(
            f"{model} has no weights '{DEFAULT_TAG}': give --pretrained {named}, or null for random weights"
        )
    return Choice(model, DEFAULT_TAG)


def _student_in(folder: Path) -> Path:
    if not (folder / STUDENT).is_file():
        raise UserError(
            f"'{folder}' is not the folder of a run (it holds no {STUDENT}): give --pretrained a run's folder or "
            "a file of weights"
        )
    return folder / STUDENT


def _name_of(saved: Architecture, file: Path) -> str:
    """Return the name by which the architecture in a file's header can be built."""
    if saved.model in BUILT_IN or registered_model(saved.model) or saved.model.startswith(OWN_WEIGHTS):
        return saved.model
    if saved.config is None:
        raise UserError(f"'{file}' holds weights of {saved.model}, which is not known here: give --model")
    # It had a config of its own, which the header repeats: open_clip reads it from a file with the model's name.
    text = json.dumps(saved.config, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = cache_folder() / "models" / digest / f"{saved.model}.json"
    if not path.is_file():
        with whole_file(path) as part:
            part.write_text(text)
    return str(path)


def with_the_tags_activation(name: str, pretrained: str | None) -> str:
    """Return the name of the model that has the activation with which the tag's weights were trained.

    A tag that does not mention the activation belongs to the model as it is.
    """
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    trained_with = tag.get("quick_gelu")
    config = open_clip.get_model_config(name) or {}
    if trained_with is None or trained_with == config.get("quick_gelu", False):
        return name
    twin = quick_gelu_twin(name)
    if twin is None or not trained_with:
        raise UserError(
            f"the weights '{pretrained}' were trained with {'QuickGELU' if trained_with else 'GELU'}, and {name} "
            "has another activation: give a --model with it"
        )
    warnings.warn(
        f"the weights '{pretrained}' were trained with QuickGELU: building {twin} in place of {name}",
        stacklevel=2,  # one caller, whoever calls that: shown once
    )
    return twin


def quick_gelu_twin(name: str) -> str | None:
    """Return the model of open_clip that differs from ``name`` in its activation alone: QuickGELU for GELU."""
    config = open_clip.get_model_config(name)
    twin = open_clip.get_model_config(f"{name}-quickgelu")
    return f"{name}-quickgelu" if config and twin == config | {"quick_gelu": True} else None


def check_model(model: str, pretrained: str | None) -> None:
    """Refuse at once, before the work, weights that do not exist or cannot be downloaded.

    Raises:
        UserError: as :func:`choose_model`, or there is no connection.
    """
    _check_reachable(*choose_model(model, pretrained))


def _check_reachable(model: str, pretrained: str | None) -> None:
    """Raise UserError at once if weights would have to be downloaded and there is no connection.

    Without this check the libraries try for minutes, and end with a long report.
    """
    if pretrained is None or registered_model(model) or Path(pretrained).is_file():
        return
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    repository = tag.get("hf_hub", "") if tag else ""
    if not repository or _in_cache(repository):
        return
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _no_connection(constants.ENDPOINT)
    if reason:
        raise UserError(
            f"the weights '{pretrained}' of {model} are not on this machine, and {constants.ENDPOINT} cannot be "
            f"reached ({reason}): connect once, give --pretrained a local file, or try --model tracer-demo, which "
            "is shipped with its weights"
        )


def _in_cache(repository: str) -> bool:
    name, _, file = repository.rpartition("/")
    files = [file] if file else []
    stem = os.path.splitext(file)[0]
    files += (
        [f"{stem}.safetensors"]
        if file
        else [
            open_clip.constants.HF_SAFE_WEIGHTS_NAME,
            open_clip.constants.HF_WEIGHTS_NAME,
        ]
    )
    return any(isinstance(try_to_load_from_cache(name, one), str) for one in files)


def _no_connection(address: str) -> str | None:
    """Return why an address does not answer; None where it does, whatever the answer."""
    try:
        request = urllib.request.Request(address, method="HEAD")
        urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return str(getattr(reason, "strerror", None) or reason)
    return None
