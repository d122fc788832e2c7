"""CLIP models: loading one with its tokenizer and picture format, and encoding pictures and texts with it."""

from __future__ import annotations

import json
import textwrap
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from open_clip.factory import _find_checkpoint_in_dir
from torch import Size, Tensor, nn

from tracer.adapters import Adapter
from tracer.errors import UserError
from tracer.models.architecture import Architecture, Form, refuse_another, saved_architecture
from tracer.models.choice import OWN_WEIGHTS, choose_model, quick_gelu_twin, with_the_tags_activation
from tracer.models.heads import head_in, read_head, set_class_head
from tracer.models.picture_format import PictureFormat
from tracer.models.registry import RegisteredModel, Tokenizer, registered_model, registered_names
from tracer.models.weights import MAX_LOGIT_SCALE, SUFFIXES, check_finite, readable_by_open_clip

CONFIG_FILE = "open_clip_config.json"  # of a folder or a hub's repository with a model


@dataclass
class Clip:
    """A dual encoder with the tokenizer of its texts and the format of its pictures.

    Attributes:
        name: the name of the model that was built; for a model config (.json) the name of the file.
        model: an ``open_clip.CLIP`` or one of its relatives, which share no base class.
        tokenizer: maps n strings to int64 tokens [n, context].
        picture_format: size, resizing and normalisation of the pictures.
        config: open_clip's model config, as built; None where it is not known.
        trained_with: the form of the loss that made the weights; None: the one that the model was made for.
    """

    name: str
    model: Any
    tokenizer: Tokenizer
    picture_format: PictureFormat
    config: dict[str, Any] | None = None
    trained_with: Form | None = None

    @property
    def architecture(self) -> Architecture:
        """Return what a file of the model's weights must say about them."""
        return Architecture(self.name, self.config, self.picture_format, self.form)

    @property
    def form(self) -> Form:
        """Return the form by which the weights' logits become probabilities."""
        return self.trained_with or Form(contrast_of(self.model))

    @property
    def logit_bias(self) -> Tensor | float:
        """Return b of the sigmoid, a fixed number or the model's own; 0 with softmaxes, which none changes."""
        if self.form.contrast == "softmax":
            return 0.0
        if self.form.logit_bias is not None:
            return self.form.logit_bias
        return self.model.logit_bias.float()


def load_clip(name: str, pretrained: str | None) -> Clip:
    """Build the model ``name`` with the weights ``pretrained``.

    A tag of open_clip brings its own activation and picture format: where open_clip would put weights that were
    trained with QuickGELU into a model with GELU (``ViT-B-16`` with ``openai``), the model with QuickGELU
    (``ViT-B-16-quickgelu``) is built. A file of this package brings its picture format, and is read into no other
    architecture. For a file that does not describe itself, what cannot be known is warned about.

    Args:
        name: a registered model, an open_clip name, ``local-dir:<folder>``, ``hf-hub:<name>``, or the path of
            a model config (.json); auto: the model that the weights name.
        pretrained: a tag of open_clip, the path of a checkpoint, or the folder of a run; None means random
            weights, for a registered model its own, and for ``local-dir:`` and ``hf-hub:`` those that lie there;
            auto: see :func:`tracer.models.choice.choose_model`.

    Raises:
        UserError: the model or the tag is unknown; the checkpoint is missing, does not fit, or belongs to another
            architecture; weights are not finite or cannot be downloaded; a folder's or a hub's model was asked to
            take other weights; or the picture format is not supported.
    """
    unset = pretrained == "auto"
    name, pretrained, registered, config = _resolved(name, pretrained)
    file = weights_file(name, pretrained)
    saved = saved_architecture(file) if file else None
    if saved and file:
        refuse_another(file, saved, name, config)
    if unset and pretrained is None and not registered and not name.startswith(OWN_WEIGHTS):
        warnings.warn(f"{name} has random weights: give --pretrained to take trained ones", stacklevel=2)
    load = _load_registered if registered else _load_open_clip
    model, tokenizer = load(name, pretrained), _tokenizer(name, pretrained, registered)
    set_class_head(model, head_in(read_head(file)) if file else None)
    check_finite(model.state_dict(), f"'{file or pretrained or name}'")
    wanted = open_clip.get_model_preprocess_cfg(model)
    if saved:
        wanted = asdict(saved.picture_format)
    elif file and not registered and not name.startswith(OWN_WEIGHTS):
        wanted = _presumed_format(name, file, wanted)
        _warn_of_an_unknown_activation(name, file)
    form = saved.form if saved else None
    if file and form == Form("sigmoid") and contrast_of(model) == "softmax":
        raise UserError(
            f"the header of '{file}' says that its weights were trained with a sigmoid, but not with which bias, "
            f"and {name} has none of its own: write the file again, with 'logit_bias' in its header"
        )
    return Clip(name, model, tokenizer, _picture_format(name, wanted), config, form)


def load_tokenizer(name: str, pretrained: str | None) -> Tokenizer:
    """Return the tokenizer of the model that :func:`load_clip` builds, without its weights.

    Raises:
        UserError: the model or the tag is unknown, or its tokenizer cannot be downloaded.
    """
    name, pretrained, registered, _ = _resolved(name, pretrained)
    return _tokenizer(name, pretrained, registered)


def contrast_of(model: Any) -> str:
    """Return the form of the contrastive loss that a model was made for: ``"sigmoid"`` if it has a logit bias."""
    return "softmax" if getattr(model, "logit_bias", None) is None else "sigmoid"


def bounded_logit_scale(model: Any) -> Tensor:
    """Return σ, exponentiated and bounded by ``MAX_LOGIT_SCALE``; models with a logit bias know no bound."""
    scale = model.logit_scale.exp()
    return scale if contrast_of(model) == "sigmoid" else scale.clamp(max=MAX_LOGIT_SCALE)


def openai_templates() -> list[str]:
    """Return open_clip's 80 ImageNet templates, in which ``{}`` stands for the name of the class."""
    return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def weights_file(name: str, pretrained: str | None) -> Path | None:
    """Return the local file from which :func:`load_clip` reads the weights; None for a tag of open_clip.

    A tag counts before a file of the same name, as in open_clip.
    """
    if name.startswith("local-dir:"):
        return _file_in_folder(name)
    if pretrained:
        tag = not registered_model(name) and bool(open_clip.get_pretrained_cfg(name, pretrained))
        return Path(pretrained) if not tag and Path(pretrained).is_file() else None
    registered = registered_model(name)
    return registered.weights if registered else None


def source_files(name: str, pretrained: str | None) -> list[Path]:
    """Return the local files that decide which model :func:`load_clip` builds, sorted where there are several.

    They are the model config (.json), the file of weights, all files of a ``local-dir:``, and those files of a
    ``hf-hub:`` model that have been downloaded. Files that do not exist are left out.
    """
    name, pretrained = choose_model(name, pretrained)
    files = [Path(name)] if name.endswith(".json") else []
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        files += sorted(folder.iterdir()) if folder.is_dir() else []
    elif name.startswith("hf-hub:"):
        names = (CONFIG_FILE, open_clip.constants.HF_SAFE_WEIGHTS_NAME, open_clip.constants.HF_WEIGHTS_NAME)
        cached = [try_to_load_from_cache(name.removeprefix("hf-hub:"), file) for file in names]
        files += [Path(path) for path in cached if isinstance(path, str)]
    elif weights := weights_file(name, pretrained):
        files.append(weights)
    return [path for path in files if path.is_file()]


def _resolved(
    name: str, pretrained: str | None
) -> tuple[str, str | None, RegisteredModel | None, dict[str, Any] | None]:
    """Return the model's own name, its weights, its entry in the registry, and its config."""
    name, pretrained = choose_model(name, pretrained)
    if pretrained and Path(pretrained).suffix in SUFFIXES and not Path(pretrained).exists():
        raise UserError(f"checkpoint '{pretrained}' does not exist: check --pretrained")
    registered = registered_model(name)
    if registered:
        return name, pretrained, registered, registered.config
    if name.endswith(".json"):
        name = _add_model_config(Path(name))
    _check_names(name, pretrained)
    name = with_the_tags_activation(name, pretrained)
    return name, pretrained, None, _config(name, pretrained)


def _tokenizer(name: str, pretrained: str | None, registered: RegisteredModel | None) -> Tokenizer:
    try:
        return registered.tokenizer() if registered else open_clip.get_tokenizer(name)
    except Exception as error:  # as many kinds as in _load_open_clip
        raise _not_loadable(name, pretrained, error) from error


def _load_registered(name: str, pretrained: str | None) -> nn.Module:
    registered = registered_model(name)
    assert registered is not None  # load_clip asked
    if pretrained and not Path(pretrained).is_file():
        raise UserError(
            f"{name} has no pretrained tags, and '{pretrained}' is not a local file: give --pretrained a "
            f".safetensors or .pt file, or null for the weights shipped with it"
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
    """Raise UserError for a model or a tag that open_clip does not know, or would not use."""
    if name.startswith(OWN_WEIGHTS):
        if pretrained:
            raise UserError(
                f"--model {name} comes with its own weights, so --pretrained {pretrained} would be ignored: "
                "give --pretrained null, or the name of the architecture as --model"
            )
        if name.startswith("local-dir:"):
            _file_in_folder(name)
        return
    models = open_clip.list_models()
    if name not in models:
        similar = [model for model in models if model.lower().startswith(name.lower()[:5])]
        registered = "".join(f"{other}, " for other in registered_names())
        raise UserError(
            f"unknown model '{name}': use an open_clip name (such as {', '.join(similar[:4]) or 'ViT-B-32'}), "
            f"{registered}local-dir:<folder>, hf-hub:<name>, or the path of a model config (.json)"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained and not Path(pretrained).is_file() and pretrained not in tags:
        raise UserError(
            f"'{pretrained}' is neither a local file nor a pretrained tag of {name} "
            f"(its tags: {', '.join(tags) or 'none'}): check --pretrained"
        )


def _file_in_folder(name: str) -> Path:
    """Return the file of weights that open_clip reads for ``local-dir:<folder>``."""
    folder = Path(name.removeprefix("local-dir:"))
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"'{folder}' holds no {CONFIG_FILE}: check --model {name}")
    file = _find_checkpoint_in_dir(folder)
    if file is None:  # open_clip would go on with random weights
        raise UserError(f"'{folder}' holds no weights (.safetensors, .bin or .pth): check --model {name}")
    return Path(file)


def _config(name: str, pretrained: str | None) -> dict[str, Any]:
    """Return open_clip's model config; UserError where it cannot be read or downloaded."""
    try:
        config = open_clip.get_model_config(name)
    except Exception as error:  # as many kinds as in _load_open_clip
        raise _not_loadable(name, pretrained, error) from error
    if not isinstance(config, dict) or not {"vision_cfg", "text_cfg"} <= config.keys():
        raise UserError(f"the {CONFIG_FILE} of {name} must hold vision_cfg and text_cfg: check --model")
    return config


def _load_open_clip(name: str, pretrained: str | None) -> nn.Module:
    file = weights_file(name, pretrained) if pretrained else None
    try:
        with ExitStack() as stack:
            readable, shapes = pretrained, dict[str, Size]()
            if file:
                path, shapes = stack.enter_context(readable_by_open_clip(file))
                readable = str(path)
                _refuse_a_logit_bias(name, file, shapes)
            # A logit scale with one dimension: DeepSpeed cannot broadcast a parameter that has none.
            model = open_clip.create_model(
                name,
                pretrained=readable,
                nonscalar_logit_scale=True,
                require_pretrained=bool(pretrained) or name.startswith(OWN_WEIGHTS),
            )
        _warn_of_resizing(model, shapes, file)
        return model
    except Exception as error:  # open_clip raises many kinds, from network errors to shapes that do not fit
        raise _not_loadable(name, pretrained, error) from error


def _refuse_a_logit_bias(name: str, file: Path, shapes: dict[str, Size]) -> None:
    """Raise UserError for SigLIP weights where the model has no bias: open_clip does not say why it fails."""
    config = open_clip.get_model_config(name) or {}
    if "logit_bias" in shapes and config.get("init_logit_bias") is None:
        raise UserError(
            f"'{file}' holds 'logit_bias', as SigLIP models do, and {name} has no such weight: "
            "give the --model that the weights were trained with"
        )


def _not_loadable(name: str, pretrained: str | None, error: Exception) -> UserError:
    which = f"model '{name}' with weights '{pretrained}'" if pretrained else f"model '{name}'"
    if isinstance(error, UserError):  # it names the remedy
        return UserError(f"{which} cannot be loaded: {error}")
    reason = textwrap.shorten(str(error), 200, placeholder=" …") or type(error).__name__
    return UserError(f"{which} cannot be loaded: {reason}: check --model and --pretrained")


def _presumed_format(name: str, file: Path, default: dict[str, Any]) -> dict[str, Any]:
    """Return the picture format of weights that do not say it, with a warning where ``default`` may be wrong.

    If all tags of the model agree on a format, it is that one.
    """
    keys = ("mean", "std", "interpolation", "resize_mode")
    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    formats = [{key: tag[key] for key in keys} for tag in tags]
    if all(other == {key: default[key] for key in keys} for other in formats):
        return default
    agreed = all(other == formats[0] for other in formats)
    taken = default | formats[0] if agreed else default
    described = ", ".join(f"{key} {taken[key]}" for key in keys)
    warnings.warn(
        f"'{file}' does not say which pictures it was trained on: taking "
        f"{f'those of the tags of {name}' if agreed else 'the usual ones'} ({described})",
        stacklevel=2,
    )
    return taken


def _warn_of_an_unknown_activation(name: str, file: Path) -> None:
    """Warn if open_clip has the model with another activation too."""
    twin = quick_gelu_twin(name)
    plain = name.removesuffix("-quickgelu")
    if twin or (plain != name and quick_gelu_twin(plain) == name):
        has, other, whose = (
            ("GELU", "QuickGELU", "OpenAI's") if twin else ("QuickGELU", "GELU", "most of LAION's")
        )
        warnings.warn(
            f"'{file}' does not say with which activation it was trained, and {name} has {has}: for weights with "
            f"{other}, such as {whose}, give --model {twin or plain}",
            stacklevel=2,
        )


def _warn_of_resizing(model: nn.Module, shapes: dict[str, Size], file: Path | None) -> None:
    """Warn of weights that open_clip resized to fit the model: positional embeddings of other sizes."""
    for name, built in model.state_dict().items():
        if name in shapes and shapes[name].numel() != built.numel():
            warnings.warn(
                f"'{file}' was made for another picture size or text length: its '{name}' was resized from "
                f"{list(shapes[name])} to {list(built.shape)}",
                stacklevel=3,  # load_clip
            )


def _picture_format(name: str, wanted: dict[str, Any]) -> PictureFormat:
    """Read a ``preprocess_cfg`` of open_clip; UserError for a format that the data pipeline cannot make."""
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


class BiasedFeatures(NamedTuple):
    """:class:`Features` of a model that adds a bias to its logits, as SigLIP's do: a scalar too."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor


def encode(
    forward: Callable[..., Any],
    image: Tensor,
    text: Tensor,
    with_text: Callable[[Tensor], None] | None = None,
) -> Features | BiasedFeatures:
    """Return the features of pictures and texts, in float32, with σ bounded by ``MAX_LOGIT_SCALE``.

    The bound changes the value of σ and not its gradient, so that training can bring σ back below it (CLIP's
    published weights start on the bound). A model with a logit bias knows no bound: published SigLIP weights
    lie above it.

    Args:
        forward: an open_clip model, or any call with the same results: a tuple that begins with image features,
            text features, logit scale and logit bias, if it has one, or a dictionary of them.
        image: pictures [N, 3, S, S].
        text: tokens [M, context].
        with_text: called with the text features as they are returned, between the towers; for a model of which
            :func:`~tracer.models.towers.encode_text_first` is true.
    """
    hook = {} if with_text is None else {"with_text": lambda v: with_text(_unit(v))}
    output = forward(image, text, **hook)
    if isinstance(output, dict):
        names = ("image_features", "text_features", "logit_scale", "logit_bias")
        output = [output[name] for name in names if name in output]
    u, v, scale, *bias = output[:4]
    u, v, scale = _unit(u), _unit(v), scale.float().squeeze()
    if bias:
        return BiasedFeatures(u, v, scale, bias[0].float().squeeze())
    bounded = scale + (scale.clamp(max=MAX_LOGIT_SCALE) - scale).detach()
    return Features(u, v, bounded)


def encode_images(forward: Callable[..., Any], image: Tensor) -> Tensor:
    """Return the L2-normalised features of pictures alone [N, D], in float32; see :func:`encode`."""
    output = forward(image)
    return _unit(output["image_features"] if isinstance(output, dict) else output[0])


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)


def texts_stand_alone(model: nn.Module) -> bool:
    """Return whether the features of a text depend on that text alone, so that equal texts have equal features.

    In training a text tower that drops at random breaks this. CoCa decodes each caption together with its picture,
    and so needs as many texts as pictures.
    """
    if not isinstance(model, (open_clip.CLIP, open_clip.CustomTextCLIP)):
        return False
    texts = [module for name, module in model.named_modules() if not name.startswith("visual")]
    return not any(draws(module) for module in texts if not isinstance(module, Adapter))


def draws(module: nn.Module) -> bool:
    """Return whether a module drops at random in training: torch's own ``p``, elsewhere a number named drop…."""
    settings = {name: value for name, value in vars(module).items() if isinstance(value, (int, float))}
    # open_clip's PatchDropout calls its probability "prob"
    dropout = "Dropout" in type(module).__name__ and max(settings.get("p", 0), settings.get("prob", 0)) > 0
    return dropout or any(value > 0 for name, value in settings.items() if "drop" in name)


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
