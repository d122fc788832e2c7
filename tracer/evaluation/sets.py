"""An evaluation set: pictures, and the rules by which they are scored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from tracer.data.index import Index

Prompts = dict[str, list[str]]


@dataclass
class EvaluationSet:
    """Pictures and the rules by which they are scored.

    Attributes:
        index: the pictures; its name is what tables call the set.
        layout: the published set that was recognised; empty for data of the user's own.
        expected: pictures of the published set; None where it is not known.
        prompts: {class: [prompt, …]} of the classifier, a row of logits for each; empty for retrieval.
        classes: {class of the set: classes of ``prompts``}: a class has the largest of their logits, and logits of
            other classes do not count. Empty: the classes of ``prompts`` are those of the set.
        groups: number of the group of each picture [N] int64; intervals draw groups with replacement.
        grouped_by: what a group is: class, camera, country, picture, or group for a column of the user's.
        regions: region of each picture; empty where the set has none.
        measure: the measure by which models are judged on the set: accuracy, macro_f1 or worst_region, as it is
            published; image_to_text_r1 for retrieval. Default: accuracy, where there are classes.
        alike: classes that may have the same prompts, since their data set says so.
        source: where the classes come from, in words.
        templates: those that made the prompts; empty where a file or the published set gives them class by class.
    """

    index: Index
    layout: str = ""
    expected: int | None = None
    prompts: Prompts = field(default_factory=dict)
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    groups: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    grouped_by: str = ""
    regions: list[str] = field(default_factory=list)
    measure: str = ""
    alike: frozenset[str] = frozenset()
    source: str = ""
    templates: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.measure = self.measure or ("image_to_text_r1" if self.retrieval else "accuracy")
        if not self.grouped_by:
            by_class = bool(self.index.classes)
            self.groups = self.index.label_numbers if by_class else np.arange(len(self.index))
            self.grouped_by = "class" if by_class else "picture"

    @property
    def name(self) -> str:
        """What tables and results call the set."""
        return self.index.name

    @property
    def retrieval(self) -> bool:
        """Whether the set is one of captions, which pictures find and which find pictures."""
        return not self.index.classes

    @property
    def class_ids(self) -> list[str]:
        """The classes among which a picture is classified, in the order of the logits."""
        return list(self.classes or self.prompts)

    @property
    def truth(self) -> np.ndarray:
        """The number of each picture's class in :attr:`class_ids` [N] int64."""
        number = {name: n for n, name in enumerate(self.class_ids)}
        numbers = np.array([number.get(c, -1) for c in self.index.classes], np.int64)
        return numbers[self.index.label_numbers]

    @property
    def members(self) -> list[list[int]]:
        """The rows of the classifier whose largest logit is that of each class, in the order of the classes."""
        row = {name: n for n, name in enumerate(self.prompts)}
        return [[row[name] for name in names] for names in self.classes.values()]

    def take(self, rows: np.ndarray) -> EvaluationSet:
        """Return the set with some of its pictures alone, in the order of ``rows``."""
        regions = [self.regions[int(row)] for row in rows] if self.regions else []
        return replace(self, index=self.index.take(rows), groups=self.groups[rows], regions=regions)
