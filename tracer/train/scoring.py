"""The scores of a run: of its start, of what it trains, and during the training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tracer.adapters import adapter_state, fold
from tracer.data.decoded import DecodedPictures
from tracer.data.index import Index
from tracer.evaluation.record import Classes
from tracer.evaluation.zero_shot import Right, Scores, add_gains, evaluate_zero_shot
from tracer.machine import compute_device
from tracer.models.clip import Clip, load_clip
from tracer.models.weights import save_weights
from tracer.train.config import Config

Weights = dict[str, Tensor]  # a state dict in float32

BEST = "best.safetensors"  # the file of --keep_best


@dataclass
class Evaluation:
    """The evaluation sets of a run, and the classes that they are scored with; None without sets."""

    sets: list[Index]
    classes: Classes | None


class Baseline(NamedTuple):
    """The start's scores, and which pictures it classifies rightly."""

    scores: Scores
    right: Right


def whole_models(
    config: Config, start: Weights, student: Weights, teacher: Weights | None
) -> dict[str, Weights]:
    """Return whole models by the names of their files; adapters are folded into ``start``."""
    weights = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    if config.adapted:
        weights = {n: fold(start | adapter_state(w), config.adapter_alpha) for n, w in weights.items()}
    return weights


class Scorer:
    """Scores weights of a run's model in a copy of the architecture, which is built when it is first needed.

    Args:
        config: settings of the run.
        evaluation: the evaluation sets, at least one.
        start: weights before the training.
        folder: of the run, for the best weights.
        baseline: the start's scores, where they are known.
    """

    def __init__(
        self,
        config: Config,
        evaluation: Evaluation,
        start: Weights,
        folder: Path,
        baseline: Baseline | None = None,
    ) -> None:
        self.config, self.evaluation, self.start, self.folder = config, evaluation, start, folder
        self.best: tuple[int, float] | None = None  # step and accuracy of the weights in BEST
        self._baseline: Baseline | None = baseline
        self._clip: Clip | None = None
        self._decoded = DecodedPictures(loading=config)

    @property
    def baseline(self) -> Baseline:
        """Return the start's scores, measured at the first call."""
        if self._baseline is None:
            self._baseline = self._measure(self.start)
        return self._baseline

    def scores(self, weights: dict[str, Weights]) -> dict[str, Scores]:
        """Return the scores of the start, named zero-shot, and of each model with its gain above the start."""
        scores = {"zero-shot": self.baseline.scores}
        for name, state in weights.items():
            scores[name], right = self._measure(state)
            add_gains(scores[name], right, self.baseline.right)
        return scores

    def during(self, step: int, student: Weights, teacher: Weights | None) -> dict[str, float]:
        """Return the scalars to log of the weights after a step, and keep them if they are the best so far."""
        models = whole_models(self.config, self.start, student, teacher)
        rows: dict[str, float] = {}
        for name, state in models.items():
            scores = self._measure(state).scores
            for of, score in scores.items():
                rows |= {
                    f"eval/{name}/{of}/accuracy": score["accuracy"],
                    f"eval/{name}/{of}/ece": score["ece"],
                }
        if self.config.keep_best:
            accuracy = rows[f"eval/student/{self.config.keep_best}/accuracy"]
            if self.best is None or accuracy > self.best[1]:
                self.best = step, accuracy
                save_weights(models["student"], self.folder / BEST, self._loaded().architecture.metadata())
        return rows

    def remember(self, rows: list[dict[str, float]]) -> None:
        """Take up the best so far from the rows of an earlier attempt's log."""
        key = f"eval/student/{self.config.keep_best}/accuracy"
        for row in rows:
            if key in row and (self.best is None or row[key] > self.best[1]):
                self.best = int(row["step"]), row[key]

    def _measure(self, state: Weights) -> Baseline:
        clip, classes = self._loaded(), self.evaluation.classes
        right: Right = {}
        assert classes is not None  # there are sets
        clip.model.load_state_dict(state)
        scores = evaluate_zero_shot(
            clip,
            self.evaluation.sets,
            classes.prompts,
            workers=self.config.workers,
            decoded=self._decoded,
            right=right,
        )
        return Baseline(scores, right)

    def _loaded(self) -> Clip:
        if self._clip is None:
            self._clip = load_clip(self.config.model, self.config.pretrained)
            self._clip.model.to(compute_device())
        return self._clip
