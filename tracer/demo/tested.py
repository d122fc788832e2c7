"""What the test sets say of the chosen models: each is read once for a model, after everything was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from tracer.demo.compare import describe_domains, method_row
from tracer.demo.config import SweepConfig
from tracer.demo.judge import Judge, Weights, finished_run, scored_row
from tracer.demo.methods import METHODS
from tracer.demo.runs import VALIDATION
from tracer.evaluation.fisher import fisher_information
from tracer.evaluation.scores import Scored, Scores, finite, numbers_alone, paired
from tracer.evaluation.zero_shot import classifier
from tracer.models.architecture import Form, one_form
from tracer.models.choice import STUDENT
from tracer.models.soups import fisher_weighted, greedy, uniform

MEASURES = ("accuracy", "ece")


class Tested:
    """The test scores of what was chosen: each method and seed along the line from the start, read once.

    A variant is measured at the end of its line alone.

    Args:
        config: of the comparison.
        judge: scores weights on the test sets.
        seeds: method → the folder of each seed's run.
        notes: method → what tables say of it.
    """

    def __init__(
        self, config: SweepConfig, judge: Judge, seeds: dict[str, list[Path]], notes: dict[str, str]
    ) -> None:
        self._config, self._judge, self._seeds, self._notes = config, judge, seeds, notes
        self._start = judge.baseline()
        self._at: dict[tuple[str, float], list[dict[str, Scored]]] = {}
        alphas = sorted({*config.alphas, config.wise_alpha} - {0.0, 1.0})
        for method, folders in seeds.items():
            ends = [(load_file(folder / STUDENT), judge.form_of(folder)) for folder in folders]
            self._at[method, 0.0] = [self._start] * len(folders)
            self._at[method, 1.0] = [judge.scored(*end) for end in ends]
            for alpha in () if METHODS[method].variant_of else alphas:
                weights = partial(judge.interpolated, alpha=alpha)
                self._at[method, alpha] = [judge.scored(weights(f), judge.form_of(f)) for f in folders]

    def results(self) -> dict[str, Any]:
        """Return the parts of results.json that the tests fill: methods, lines, and paired differences."""
        rows = [method_row("zero-shot", "Zero-shot", "no training", [scored_row(_scores(self._start))])]
        for method, folders in self._seeds.items():
            runs = [finished_run(folder, seed) for seed, folder in enumerate(folders)]
            tested = zip(runs, self._at[method, 1.0], strict=True)
            runs = [run | {"eval": _scores(scored), "teacher_eval": None} for run, scored in tested]
            about = METHODS[method]
            note = "; ".join(filter(None, (about.note, self._notes.get(method))))
            rows.append(method_row(method, about.title, note, runs, about.variant_of))
        plain, alpha = self._plain, self._config.wise_alpha
        wise = [scored_row(_scores(s), seed) for seed, s in enumerate(self._at[plain, alpha])]
        rows.append(
            method_row("wise-ft", "WiSE-FT", f"{METHODS[plain].title} and start, α = {alpha:g}", wise)
        )
        lines = [self._line(method) for method in self._main]
        return {"methods": rows, "curves": lines, "pairs": self._pairs()}

    @property
    def _main(self) -> list[str]:
        """The methods but the variants, which are compared with their own method alone."""
        return [method for method in self._seeds if not METHODS[method].variant_of]

    @property
    def _plain(self) -> str:
        """The method that WiSE-FT averages with the start, and that others are compared with."""
        return next((m for m in ("flyp", "flyp-multi") if m in self._seeds), self._main[0])

    def _line(self, method: str) -> dict[str, Any]:
        line = sorted((alpha, scored) for (name, alpha), scored in self._at.items() if name == method)
        points = [
            {"alpha": alpha, "seed": seed, "eval": numbers_alone(_scores(scored))}
            for alpha, each in line
            for seed, scored in enumerate(each)
        ]
        points.sort(key=lambda p: (p["seed"], p["alpha"]))
        return {"key": method, "name": METHODS[method].title, "points": points}

    def soups(
        self, validating: Judge, trials: dict[str, list[tuple[Path, float]]]
    ) -> dict[str, dict[str, Any]]:
        """Return each method's soups with their paired differences to its chosen trial; see :func:`soups`."""
        mixed = {method: soups(validating, runs) for method, runs in trials.items()}
        return {method: self._tested(kinds, method) for method, kinds in mixed.items()}

    def _tested(self, kinds: dict[str, Soup], method: str) -> dict[str, Any]:
        """Return the soups of a method as the results have them."""
        chosen, described = self._at[method, 1.0][0], {}
        for kind, soup in kinds.items():
            scored = self._judge.scored(soup.weights, soup.form)
            pairs = self._differences(kind, [scored], method, [chosen])
            described[kind] = {
                "validation": soup.validation,
                "eval": numbers_alone(_scores(scored)),
                "pairs": pairs,
            } | ({"trials": soup.trials} if soup.trials else {})
        return described

    def _pairs(self) -> list[dict[str, Any]]:
        """Return the paired differences of every method and of WiSE-FT, to the plain one and to WiSE-FT."""
        plain, wise = (self._plain, 1.0), (self._plain, self._config.wise_alpha)
        keys = {plain: self._plain, wise: "wise-ft"} | {(m, 1.0): m for m in self._main}
        pairs = []
        for other in dict.fromkeys((plain, wise)):  # one where WiSE-FT's α is 1
            for one in keys:
                if one != other:
                    pairs += self._differences(keys[one], self._at[one], keys[other], self._at[other])
        return pairs

    def _differences(
        self, one: str, now: Sequence[dict[str, Scored]], other: str, before: Sequence[dict[str, Scored]]
    ) -> list[dict[str, Any]]:
        """Return the paired differences of ``one`` to ``other``, by the scores of their seeds, set by set."""
        roles = {d["name"]: d["kind"] for d in describe_domains(self._config, self._judge.sets)}
        pairs = []
        for role in ("in-distribution", "shifted"):
            names = [name for name, r in roles.items() if r == role]
            a, b = ([scored[name] for scored in side for name in names] for side in (now, before))
            for measure in MEASURES if names else ():
                result = paired(a, b, measure)
                if result:
                    pair = {"one": one, "other": other, "column": role, "measure": measure}
                    pairs.append(pair | result._asdict())
        return pairs


class Soup(NamedTuple):
    """A mixture of trials: its weights and their form, its validation score, and of a greedy one the trials."""

    weights: Weights
    form: Form
    validation: float
    trials: list[str]


def soups(validating: Judge, runs: list[tuple[Path, float]]) -> dict[str, Soup]:
    """Return the uniform, greedy and Fisher-weighted soup of a method's trials.

    The greedy one is chosen, and the Fisher information measured, on the validation set.

    Args:
        validating: scores weights on the validation set.
        runs: folder and validation score of each trial.
    """
    form = one_form({folder.name: validating.form_of(folder) for folder, _ in runs})
    models = [load_file(folder / STUDENT) for folder, _ in runs]
    validate = partial(_validated, validating, form=form)
    best, chosen = greedy(models, validate, [score for _, score in runs])
    fishers = [_fisher(validating, model, form) for model in models]
    kinds = {"uniform": uniform(models), "greedy": best, "fisher": fisher_weighted(models, fishers)}
    mixed = {kind: Soup(weights, form, validate(weights), []) for kind, weights in kinds.items()}
    return mixed | {"greedy": mixed["greedy"]._replace(trials=[runs[n][0].name for n in chosen])}


def _validated(validating: Judge, weights: Weights, form: Form) -> float:
    score = validating.scores(weights, form)[VALIDATION]
    return score[score["measure"]]


def _fisher(validating: Judge, weights: Weights, form: Form) -> Weights:
    (own,) = validating.sets
    clip = validating.with_weights(weights, form)
    return fisher_information(clip, own.index, classifier(clip, own.prompts), workers=validating.workers)


def _scores(scored: dict[str, Scored]) -> Scores:
    return {name: finite(each.score) for name, each in scored.items()}
