"""What the baselines add to a training step: modules beside the towers, and terms beside the objective."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tracer.errors import UserError
from tracer.models.clip import BiasedFeatures, Features, contrast_of, projections
from tracer.models.heads import FUSION, Fusion
from tracer.models.towers import mask_patches
from tracer.ops import contrastive_loss
from tracer.regularisers import gradient_distance, l2_sp, ldreg
from tracer.train.classifier import freeze_for_classifier
from tracer.train.ranks import ranks


def add_baseline(config: Any, model: nn.Module) -> None:
    """Freeze what a classifier does not train, and add the masks and the fusion encoders of the settings.

    Args:
        config: settings of a run.
        model: open_clip model, changed in place.

    Raises:
        UserError: the model has no patches to mask, or no projections whose width is known.
    """
    if config.classifier != "none":
        freeze_for_classifier(config, model)
    if config.mask:
        mask_patches(model, config.mask)
    if config.augmented and config.method == "tracer":
        matrices = projections(model)
        if matrices is None:
            raise UserError(
                "--augmented needs towers that end with a linear projection: choose another --model"
            )
        setattr(model, FUSION, Fusion(matrices[0].shape[1]))


class Extras:
    """The terms of the baselines beside the objective, for the batches of one process.

    Args:
        settings: a run's.
        model: open_clip model with the weights of the start.

    Raises:
        UserError: the settings do not allow a term; names the option.
    """

    def __init__(self, settings: Any, model: nn.Module) -> None:
        self._settings = settings
        self._weights = [p for p in model.parameters() if p.requires_grad] if settings.l2_sp else []
        self._start = [p.detach().float().clone() for p in self._weights]
        self._fusion: Fusion | None = getattr(model, FUSION, None)
        check_extras(settings, model)

    def terms(
        self,
        student: Features | BiasedFeatures,
        teacher: Features | BiasedFeatures | None,
        labels: Tensor | None,
    ) -> dict[str, tuple[float, Tensor]]:
        """Return {name: (weight, value)} of each term that is on."""
        settings, terms = self._settings, {}
        if settings.l2_sp:
            terms["l2_sp"] = settings.l2_sp, l2_sp(self._weights, self._start)
        if settings.ldreg:
            terms["ldreg"] = settings.ldreg, ldreg(student.image, settings.ldreg_neighbours)
        if settings.gradient and teacher is not None:
            weight = settings.gradient * settings.distill_weight
            terms["gradient"] = weight, gradient_distance(student[:3], teacher[:3], labels)
        if self._fusion is not None and teacher is not None:
            fused = self._fusion(student[:2], teacher[:2])
            weight = settings.augmented * settings.distill_weight
            terms["augmented"] = weight, contrastive_loss(*fused, labels=labels).loss
        return terms


def check_extras(settings: Any, model: nn.Module) -> None:
    """Raise UserError for a term of the baselines that a run's other settings or its model do not allow."""
    need_teacher = {"gradient": settings.gradient, "augmented": settings.augmented}
    for name, weight in need_teacher.items():
        if weight and settings.method != "tracer":
            raise UserError(f"--{name} {weight:g} needs a teacher, which --method {settings.method} has not")
        if weight and (settings.contrast or contrast_of(model)) == "sigmoid":
            raise UserError(
                f"--{name} has no meaning for the sigmoid of each pair: leave it out, or give --contrast softmax"
            )
    whole = {"l2_sp": settings.l2_sp, "augmented": settings.augmented}
    for name, on in whole.items():
        if on and (settings.micro_batch or settings.zero_stage == 3):
            raise UserError(
                f"--{name} needs the whole weights in each pass: leave out --micro_batch and --zero_stage 3"
            )
    if (any(need_teacher.values()) or settings.ldreg) and ranks().size > 1:
        raise UserError(
            "--ldreg, --gradient and --augmented see the pairs of one rank alone: run them in one process"
        )
    if settings.classifier == "none":
        return
    if settings.zero_stage == 3:
        raise UserError("--classifier needs its weights whole: leave out --zero_stage 3")
    if contrast_of(model) == "sigmoid":
        raise UserError(
            f"--classifier {settings.classifier} takes a softmax over classes, and the model's probabilities are "
            "sigmoids: choose a --model without a logit bias"
        )
