"""The terms of the baselines that stand beside the objective in a training step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tracer.errors import UserError
from tracer.models.clip import BiasedFeatures, Features, contrast_of
from tracer.regularisers import gradient_distance, l2_sp, ldreg
from tracer.train.ranks import ranks


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
        distilled = settings.gradient if settings.method == "tracer" else 0.0
        if settings.gradient and settings.method != "tracer":
            raise UserError(
                f"--gradient {settings.gradient:g} needs a teacher, which --method {settings.method} has not"
            )
        if distilled and (settings.contrast or contrast_of(model)) == "sigmoid":
            raise UserError(
                "--gradient has no meaning for the sigmoid of each pair: leave it out, or give --contrast softmax"
            )
        if settings.l2_sp and (settings.micro_batch or settings.zero_stage == 3):
            raise UserError(
                "--l2_sp needs the whole weights in each pass: leave out --micro_batch and --zero_stage 3"
            )
        if (settings.ldreg or distilled) and ranks().size > 1:
            raise UserError("--ldreg and --gradient see the pairs of one rank alone: run them in one process")

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
        return terms
