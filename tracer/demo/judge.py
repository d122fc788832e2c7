"""Scores of any weights of the demo's model, and predictions on example pictures."""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from tracer.data.decoded import DecodedPictures
from tracer.demo.config import SweepConfig
from tracer.evaluation.scores import Scored, Scores, add_gains, finite
from tracer.evaluation.sets import EvaluationSet
from tracer.evaluation.zero_shot import classifier, evaluate_sets, predict
from tracer.machine import compute_device
from tracer.models.architecture import Form, saved_architecture
from tracer.models.choice import STUDENT
from tracer.models.clip import Clip, load_clip
from tracer.models.heads import load_state, start_head
from tracer.models.soups import interpolate
from tracer.train.log import read_log
from tracer.train.scoring import Baseline

Weights = dict[str, Tensor]
Rows = list[dict[str, Any]]  # entries of results.json


def scored_row(
    scores: Scores, seed: int | None = None, log: list | None = None, seconds: float = 0.0
) -> dict[str, Any]:
    """Return a run as results.json holds it; :class:`tracer.report.results.Run` is its schema."""
    return {"seed": seed, "eval": scores, "teacher_eval": None, "log": log or [], "seconds": seconds}


def finished_run(folder: Path, seed: int) -> dict[str, Any]:
    """Return a run as results.json holds it, read from its folder."""
    metrics = json.loads((folder / "metrics.json").read_text())["scores"]
    about = json.loads((folder / "run.json").read_text())
    row = scored_row(metrics["student"], seed, read_log(folder), about["seconds"])
    more = {"teacher_eval": metrics.get("teacher"), "sizes": about["sizes"], "notices": about["notices"]}
    return row | more | {"weights": about["weights"]["student"]}


@dataclass
class Judge:
    """Scores any weights of the demo's model on the evaluation sets.

    ``start`` are the weights of the start. Wherever weights are scored, ``form`` says by which form of the loss;
    None: by the start's.
    """

    clip: Clip
    start: Weights
    sets: list[EvaluationSet]
    workers: int
    decoded: DecodedPictures = field(default_factory=DecodedPictures)  # small sets stay for the next model
    max_bad: float = 0.0
    start_scored: Baseline = field(default_factory=dict)

    @classmethod
    def of(cls, config: SweepConfig, sets: list[EvaluationSet]) -> Judge:
        """Load the start, and return a judge that keeps a copy of its weights."""
        clip = load_clip(config.model, config.pretrained)
        start = {name: value.clone() for name, value in clip.model.state_dict().items()}
        clip.model.to(compute_device())
        return cls(clip, start, sets, config.workers, DecodedPictures(loading=config), config.max_bad)

    def form_of(self, folder: Path) -> Form:
        """Return the form of the loss with which a run was trained."""
        saved = saved_architecture(folder / STUDENT)
        return (saved and saved.form) or self.clip.form

    def with_weights(self, weights: Weights, form: Form | None) -> Clip:
        """Return the model with these weights."""
        load_state(self.clip.model, weights)
        return dataclasses.replace(self.clip, trained_with=form or self.clip.form)

    def scored(self, weights: Weights, form: Form | None = None) -> dict[str, Scored]:
        """Return the scores of the model with these weights, with their gains once the start is scored."""
        clip = self.with_weights(weights, form)
        scored = evaluate_sets(
            clip, self.sets, workers=self.workers, decoded=self.decoded, max_bad=self.max_bad
        )
        add_gains(scored, self.start_scored)
        return scored

    def baseline(self) -> Baseline:
        """Return the scores of the start; those of other weights then have their gains above it."""
        if not self.start_scored:
            self.start_scored = self.scored(self.start)
        return self.start_scored

    def scores(self, weights: Weights, form: Form | None = None) -> Scores:
        """Return the scores of the model with these weights."""
        return {name: finite(each.score) for name, each in self.scored(weights, form).items()}

    def interpolated(self, folder: Path, alpha: float) -> Weights:
        """Return (1 − α) start + α student of a run (WiSE-FT)."""
        return interpolate(self.start | start_head(folder), load_file(folder / STUDENT), alpha)


def choose_examples(judge: Judge, runs: dict[str, Path], per_set: int = 4) -> Rows:
    """Return pictures with every method's prediction: half of each set at random, half where methods differ."""
    states: dict[str, tuple[Weights, Form | None]] = {"zero-shot": (judge.start, None)}
    states |= {key: (load_file(folder / STUDENT), judge.form_of(folder)) for key, folder in runs.items()}
    draw = random.Random(0)
    samples = [
        each.take(np.array(sorted(draw.sample(range(len(each.index)), min(64, len(each.index))))))
        for each in judge.sets
    ]
    predictions = {
        key: _predictions(judge.with_weights(*state), judge, samples) for key, state in states.items()
    }
    examples = []
    for n, index in enumerate(each.index for each in samples):
        rows = draw.sample(range(len(index)), len(index))
        differ = [r for r in rows if len({p[n][r][0] for p in predictions.values()}) > 1]
        for r in list(dict.fromkeys(differ[: per_set // 2] + rows))[:per_set]:
            examples.append(
                {
                    "image": str(index.images[r]),
                    "domain": index.name,
                    "truth": index.labels[r],
                    "predictions": {key: p[n][r] for key, p in predictions.items()},
                }
            )
    return examples


def _predictions(clip: Clip, judge: Judge, samples: list[EvaluationSet]) -> list[list[tuple[str, float]]]:
    """Return the most probable class and its probability, for each picture of each sample."""
    weights = {id(each.prompts): classifier(clip, each.prompts) for each in samples}
    predictions = []
    for each in samples:
        kept, names = (
            predict(clip, each, weights[id(each.prompts)], decoded=judge.decoded),
            each.class_ids,
        )
        chosen = zip(kept.predicted.tolist(), kept.confidence.tolist(), strict=True)
        predictions.append([(names[number], confidence) for number, confidence in chosen])
    return predictions
