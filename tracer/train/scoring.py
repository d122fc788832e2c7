"""The scores of a run: of its start, of what it trains, and during the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from tracer.adapters import adapter_state, fold
from tracer.data.decoded import DecodedPictures
from tracer.evaluation.scores import Scored, Scores, add_gains, finite
from tracer.evaluation.sets import EvaluationSet
from tracer.evaluation.zero_shot import evaluate_sets
from tracer.machine import compute_device
from tracer.models.architecture import Form
from tracer.models.clip import Clip, contrast_of, load_clip
from tracer.models.heads import load_state
from tracer.models.weights import save_weights
from tracer.recipes import SIGLIP_BIAS
from tracer.train.config import Config
from tracer.train.sections import MethodSettings

Weights = dict[str, Tensor]  # a state dict in float32

Baseline = dict[str, Scored]  # the start's scores by set, with what they were made of

BEST = "best.safetensors"  # the file of --keep_best

AnySettings = TypeVar("AnySettings", bound=MethodSettings)


def trained_form(settings: MethodSettings, start: Clip) -> Form:
    """Return the form of the loss with which ``start`` is trained: the settings', else the one it came with."""
    contrast = settings.contrast or start.form.contrast
    if contrast == "softmax" or contrast_of(start.model) == "sigmoid":
        return Form(contrast)
    fixed = (settings.logit_bias, start.form.logit_bias, SIGLIP_BIAS)
    return Form(contrast, next(bias for bias in fixed if bias is not None))


def with_form_of(settings: AnySettings, start: Clip) -> AnySettings:
    """Return the settings with the form of the loss that ``start`` came with, in place of what they leave open."""
    form = trained_form(settings, start)
    bias = settings.logit_bias if form.logit_bias is None else form.logit_bias
    return dataclasses.replace(settings, contrast=form.contrast, logit_bias=bias)  # type: ignore[arg-type]


def trained_from(config: MethodSettings, start: Weights) -> Weights:
    """Return the weights that the training began with: those of the start, and the logit bias of the settings."""
    if config.logit_bias is None or "logit_bias" not in start:
        return start
    return start | {"logit_bias": torch.full_like(start["logit_bias"], config.logit_bias)}


def whole_models(
    config: Config, start: Weights, student: Weights, teacher: Weights | None
) -> dict[str, Weights]:
    """Return whole models by the names of their files; adapters are folded into what the training began with."""
    weights = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    if config.adapted:
        base = trained_from(config, start)
        weights = {n: fold(base | adapter_state(w), config.adapter_alpha) for n, w in weights.items()}
    return weights


class Scorer:
    """Scores weights of a run's model in a copy of the architecture, which is built when it is first needed.

    Args:
        config: settings of the run.
        sets: the evaluation sets.
        start: weights before the training.
        folder: of the run, for the best weights.
        baseline: the start's scores, where they are known.
    """

    def __init__(
        self,
        config: Config,
        sets: list[EvaluationSet],
        start: Weights,
        folder: Path,
        baseline: Baseline | None = None,
    ) -> None:
        self.config, self.sets, self.start, self.folder = config, sets, start, folder
        self.best: tuple[int, float] | None = None  # step and value of the weights in BEST
        self._baseline: Baseline | None = baseline
        self._clip: Clip | None = None
        self._decoded = DecodedPictures(loading=config)

    @property
    def baseline(self) -> Baseline:
        """Return the start's scores, measured at the first call."""
        if self._baseline is None:
            self._baseline = self._measure(self.start, self._loaded().form)
        return self._baseline

    def scores(self, weights: dict[str, Weights]) -> dict[str, Scores]:
        """Return the scores of the start, named zero-shot, and of each model with its gains above the start."""
        if not self.sets:
            return {}
        scored = {"zero-shot": self.baseline}
        for name, state in weights.items():
            scored[name] = self._measure(state, self._form)
            add_gains(scored[name], self.baseline)
        return {
            model: {of: finite(each.score) for of, each in sets.items()} for model, sets in scored.items()
        }

    def during(
        self, step: int, student: Weights, teacher: Weights | None, point: Callable[[], None]
    ) -> dict[str, float]:
        """Return the scalars to log of the weights after a step, and keep them if they are the best so far.

        ``point`` is called between batches; what it raises ends the evaluation.
        """
        models = whole_models(self.config, self.start, student, teacher)
        rows: dict[str, float] = {}
        for name, state in models.items():
            for of, each in self._measure(state, self._form, point).items():
                measures = dict.fromkeys([each.score["measure"], "accuracy", "ece"])
                rows |= {f"eval/{name}/{of}/{m}": each.score[m] for m in measures if m in each.score}
        if self.config.keep_best:
            value = rows[self._best_key]
            if self.best is None or value > self.best[1]:
                self.best = step, value
                architecture = dataclasses.replace(self._loaded().architecture, form=self._form)
                save_weights(models["student"], self.folder / BEST, architecture.metadata())
        return rows

    def remember(self, rows: list[dict[str, float]]) -> None:
        """Take up the best so far from the rows of an earlier attempt's log."""
        for row in rows if self.config.keep_best else ():
            value = row.get(self._best_key)
            if value is not None and (self.best is None or value > self.best[1]):
                self.best = int(row["step"]), value

    @property
    def _best_key(self) -> str:
        """The logged scalar by which the best weights are chosen: the measure by which the set is published."""
        (kept,) = (each for each in self.sets if each.name == self.config.keep_best)
        return f"eval/student/{kept.name}/{kept.measure}"

    @property
    def _form(self) -> Form:
        """The form of what is trained."""
        return trained_form(self.config, self._loaded())

    def _measure(self, state: Weights, form: Form, point: Callable[[], None] | None = None) -> Baseline:
        clip = dataclasses.replace(self._loaded(), trained_with=form)
        load_state(clip.model, state)
        return evaluate_sets(
            clip,
            self.sets,
            workers=self.config.workers,
            decoded=self._decoded,
            max_bad=self.config.max_bad,
            point=point,
        )

    def _loaded(self) -> Clip:
        if self._clip is None:
            self._clip = load_clip(self.config.model, self.config.pretrained)
            self._clip.model.to(compute_device())
        return self._clip
