"""Training a linear classifier on the image features: where it begins, and what trains when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from tracer.data.index import Index
from tracer.errors import UserError
from tracer.evaluation.prompts import check_labelled, class_prompts
from tracer.evaluation.record import classes_for
from tracer.evaluation.sets import EvaluationSet, Prompts
from tracer.evaluation.zero_shot import classifier, logit_scale
from tracer.models.clip import Clip, encode_images
from tracer.models.heads import ClassHead, class_head, set_class_head
from tracer.train.config import Config
from tracer.train.engine import mixed_precision

if TYPE_CHECKING:
    from tracer.train.engine import DeepSpeedEngine


def begin_classifier(config: Config, clip: Clip, index: Index, prompts: Prompts) -> None:
    """Give the model of a run the classifier that it trains, or take the one away that it does not train.

    W begins as the zero-shot classifier times the logit scale (WiSE-FT: Wortsman et al. 2022, arXiv 2109.01903,
    and its code), with the prompts of the evaluation; a start that has a classifier of the same classes keeps it.

    Args:
        config: settings of the run.
        clip: the start, changed in place.
        index: the training data.
        prompts: from :func:`prompts_of_training`.
    """
    own = class_head(clip.model)
    if config.classifier == "none":
        set_class_head(clip.model, None)
    elif own is None or own.classes != index.classes:
        set_class_head(clip.model, None)
        rows = classifier(clip, prompts).clone()  # it was made in inference mode
        set_class_head(clip.model, ClassHead(rows * logit_scale(clip).detach(), index.classes))


def check_classes(config: Config, index: Index) -> None:
    """Raise UserError if a classifier shall be trained on pictures without labels, or on one class."""
    if config.classifier == "none":
        return
    check_labelled([index])
    if len(index.classes) < 2:
        raise UserError(
            f"--classifier {config.classifier} needs at least two classes, and --train_data has "
            f"{len(index.classes)}: add pictures of others"
        )


def prompts_of_training(config: Config, index: Index, sets: list[EvaluationSet]) -> Prompts:
    """Return the prompts of the classes that a classifier is trained on; none where none is trained.

    They are those of a set that has them all, else a set's default.

    Raises:
        UserError: a class has no prompts.
    """
    if config.classifier == "none":
        return {}
    known = [each.prompts for each in sets if not each.retrieval]
    if config.classes:
        known.insert(0, class_prompts(config.classes, []))
    whole = next((prompts for prompts in known if set(index.classes) <= set(prompts)), None)
    if whole is None and config.classes:
        missing = next(name for name in index.classes if name not in known[0])
        raise UserError(f"the class '{missing}' of --train_data has no prompts in --classes: add them")
    whole = whole or classes_for(config.prompt_template, index, [index]).prompts
    return {name: whole[name] for name in index.classes}


def freeze_for_classifier(config: Config, model: nn.Module) -> None:
    """Let the classifier alone ask for gradients, and the image tower unless it is only probed."""
    for name, parameter in model.named_parameters():
        tower = name.startswith("visual.") and config.classifier != "probe"
        if not tower and not name.startswith("class_head."):
            parameter.requires_grad_(False)


def probes(config: Config, step: int) -> bool:
    """Return whether the classifier trains alone in step 1, 2, …: in LP-FT in the first half of the steps."""
    return config.classifier == "probe" or (
        config.classifier == "probe-first" and step <= config.total_steps // 2
    )


def class_loss(
    config: Config, engine: DeepSpeedEngine, precision: str, image: Tensor, label: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """Return the sum of the pictures' cross-entropies, a scalar, and the image features [n, D].

    Args:
        config: settings of the run.
        engine: of a model with a classifier.
        precision: of the tower; the logits are float32.
        image, label: a part of the batch [n, 3, S, S] and [n].
        step: of the run, 1, 2, ….
    """
    head = class_head(engine.module)
    assert head is not None
    with mixed_precision(engine.device, precision):
        features = encode_images(engine, image)
    own = features.detach() if probes(config, step) else features
    return F.cross_entropy(head(own), label, reduction="sum"), features.detach()
