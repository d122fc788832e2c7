"""What a file of results says beside its numbers: schema, model, weights, classes and prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tracer.data.index import Index
from tracer.data.text import sorted_ids, words
from tracer.evaluation.prompts import class_prompts, names_of
from tracer.evaluation.sets import EvaluationSet
from tracer.files import digest_of
from tracer.models.choice import choose_model
from tracer.models.clip import openai_templates, weights_file
from tracer.models.weights import digest_of_values
from tracer.words import counted

SCHEMA = 1  # of every file of results; docs/results.md says what each version holds

MANY_PROMPTS = 1000  # a published set with more of them is described by their digest


class Classes(NamedTuple):
    """The classes of evaluation sets, where they come from in words, and the prompts of each.

    ``templates`` are those that made the prompts; empty where a file gives them, class by class.
    """

    source: str
    prompts: dict[str, list[str]]
    templates: list[str]

    @classmethod
    def of(cls, each: EvaluationSet) -> Classes:
        """Return the classes of a set."""
        return cls(each.source, each.prompts, each.templates)

    def record(self) -> dict[str, Any]:
        """Return the fields ``classes`` and ``prompts`` of a file of results.

        Prompts that templates make of the ids of the classes are described by the templates alone.
        """
        made = self.templates and self.prompts == _made(list(self.prompts), self.templates)
        prompts: dict[str, Any] = {"templates": self.templates} if made else {"by_class": self.prompts}
        return {"classes": list(self.prompts), "prompts": prompts}

    def sentence(self) -> str:
        """Return how many classes there are, where they come from, and what they are prompted with."""
        made = "their own prompts"
        if self.templates:
            more = f" and {len(self.templates) - 1} more" if len(self.templates) > 1 else ""
            made = f"'{self.templates[0]}'{more}"
        classes = counted(len(self.prompts), "class", "classes")
        return f"{classes}, those of {self.source}, with {made}"


def classes_for(
    templates: Sequence[str], training: Index | None, sets: list[Index], run: Path | None = None
) -> Classes:
    """Return the classes that ``sets`` are evaluated with, where no file gives them.

    They are those of the training, else those that the sets have together.

    Args:
        templates: the setting ``prompt_template``; empty: the templates of a run, else of the first set.
        training: the training data, in a run.
        sets: evaluation sets.
        run: the ``run.json`` of the run that trained the model, from :func:`run_of`.

    Raises:
        UserError: there are fewer than two classes.
    """
    ids = sorted_ids(list({name for index in sets for name in index.classes}))
    source = "the evaluation sets" if len(sets) > 1 else f"'{sets[0].name}'"
    if run is not None:
        content, source = json.loads(run.read_text()), f"the run '{run.parent}'"
        ids, kept = content["classes"], content["prompts"]
        if not templates:
            made = kept.get("templates", [])
            return Classes(source, kept.get("by_class") or _made(ids, made), made)
    elif training is not None and training.classes:
        ids, source = training.classes, "the training data"
    filled = [
        t
        for given in templates or sets[0].templates
        for t in (openai_templates() if given == "openai" else [given])
    ]
    return Classes(source, class_prompts(None, ids, names_of(training or sets[0], sets), filled), filled)


def _made(ids: list[str], templates: list[str]) -> dict[str, list[str]]:
    return {name: [template.replace("{}", words(name)) for template in templates] for name in ids}


def run_of(pretrained: str | None) -> Path | None:
    """Return the ``run.json`` beside the weights that a setting names, if a run wrote it with its classes."""
    if not pretrained or not Path(pretrained).exists():
        return None
    path = Path(pretrained)
    path = (path if path.is_dir() else path.parent) / "run.json"
    try:
        return path if len(json.loads(path.read_text()).get("classes") or ()) >= 2 else None
    except (OSError, ValueError, AttributeError):
        return None


def head(
    kind: str, model: str, weights: Mapping[str, str | None], sets: Sequence[EvaluationSet]
) -> dict[str, Any]:
    """Return what a file of results begins with.

    Args:
        kind: of the file: metrics, run, evaluation or comparison.
        model: name of the architecture.
        weights: SHA-256 of each model's weights, by its name.
        sets: of the evaluation, if there was one. The classes of the user's own stand in the head; a set with
            other classes or prompts, such as a published one, has an entry in ``sets``.
    """
    own = next((each for each in sets if not each.layout and not each.retrieval), None)
    common = Classes.of(own).record() if own else {"classes": [], "prompts": {"templates": []}}
    others = [each for each in sets if not each.retrieval and (own is None or each.prompts != own.prompts)]
    described = {"sets": {each.name: _record_of(each) for each in others}} if others else {}
    return {"schema": SCHEMA, "kind": kind, "model": model, "weights": dict(weights), **common, **described}


def _record_of(each: EvaluationSet) -> dict[str, Any]:
    record = Classes.of(each).record()
    if each.layout and sum(map(len, each.prompts.values())) > MANY_PROMPTS:
        text = json.dumps(each.prompts, ensure_ascii=False, separators=(",", ":"))
        record["prompts"] = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    return record | {"classes": each.class_ids}


def sentences(sets: Sequence[EvaluationSet]) -> list[str]:
    """Return a sentence about each group of sets that share their classes and prompts."""
    groups: dict[int, list[EvaluationSet]] = {}  # by the prompts, which sets share
    for each in sets:
        if not each.retrieval:
            groups.setdefault(id(each.prompts), []).append(each)
    spoken = {", ".join(each.name for each in group): Classes.of(group[0]) for group in groups.values()}
    return [f"{names}: {classes.sentence()}" for names, classes in spoken.items()]


def digest_of_start(model: str, pretrained: str | None, state: Mapping[str, Any]) -> str:
    """Return the digest of the weights that two settings mean: of their file, or else of the values."""
    file = weights_file(*choose_model(model, pretrained))
    return digest_of(file) if file is not None else digest_of_values(state)
