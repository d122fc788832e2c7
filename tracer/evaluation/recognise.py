"""Which published evaluation set, if any, lies at a path; other data are sets of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tracer.data.build import check_sources, read_index
from tracer.data.config import LoadingSettings
from tracer.data.index import Index
from tracer.data.table import read_groups
from tracer.errors import UserError
from tracer.evaluation.captions import read_captions
from tracer.evaluation.coop import read_coop
from tracer.evaluation.imagenet import read_imagenet
from tracer.evaluation.prompts import check_distinct, check_labels, class_prompts, named_alike
from tracer.evaluation.record import classes_for
from tracer.evaluation.sets import EvaluationSet, Prompts
from tracer.evaluation.wilds import read_wilds
from tracer.models.clip import load_tokenizer

Reader = Callable[[Path, str, LoadingSettings], list[EvaluationSet]]

# Each returns the sets at a path, and none where the path is not of its layout; a new layout is a file and a
# name here.
READERS: tuple[Reader, ...] = (read_wilds, read_captions, read_coop, read_imagenet)


def check_eval_data(eval_data: Mapping[str, Path]) -> None:
    """Raise UserError for the first evaluation set that does not exist; none is opened."""
    for path in eval_data.values():
        folder, colon, _ = str(path).rpartition(":")  # before the name of a split
        if not colon or not Path(folder).exists():
            check_sources([path])


def read_sets(
    eval_data: Mapping[str, Path],
    loading: LoadingSettings,
    classes: Path | None = None,
    training: Index | None = None,
    templates: Sequence[str] = (),
    run: Path | None = None,
) -> list[EvaluationSet]:
    """Read evaluation sets and recognise the published ones among them; nothing is downloaded.

    Sets of the user's own share their classes: those of the training, or else of all these sets together. A
    set that gives its classes names has its own, where there was no training. A published set always has.

    Args:
        eval_data: name → folder, table, shards or file of captions. iWildCam and FMoW give a set for each of their
            splits id_val, id_test and test, or one where the path ends with ``:SPLIT``.
        loading: how data is read.
        classes: JSON file {class: [prompt, …]}; takes the place of the prompts of every set whose classes it
            holds.
        training: the training data.
        templates: of the prompts of the user's own sets; default: the sets' own.
        run: the ``run.json`` of the run that trained the model, if it is not this one.

    Raises:
        UserError: a set cannot be read or scored: a file of its layout is missing, a class is unknown or has no
            prompts, or all pictures are of one class.
    """
    given = class_prompts(classes, []) if classes else {}
    sets = [each for name, path in eval_data.items() for each in _read(path, name, loading, given)]
    own = [each for each in sets if not each.layout and not each.retrieval]
    known = run is not None or (training is not None and bool(training.classes))
    together = [each.index for each in own if known or not each.index.about.named]
    indexes = [*together, *([training] if training is not None else [])]
    for each in own:
        if given:
            each.source, each.prompts = f"'{classes}'", given
        else:
            alone = not known and each.index.about.named
            own_templates = templates or ([] if run is not None else each.index.templates)
            chosen = classes_for(own_templates, training, [each.index] if alone else together, run)
            each.source, each.prompts, each.templates = chosen
        each.alike = frozenset(named_alike(each.index, *indexes))
    for each in sets:
        _check(each, given)
    _share_prompts(sets)
    return sets


def check_prompts(sets: list[EvaluationSet], model: str, pretrained: str | None) -> None:
    """Raise UserError if two classes of the user's own prompts are the same to the tokenizer of a model.

    No weights are loaded.
    """
    checked: list[int] = []
    tokenizer = None
    for each in sets:
        if not each.layout and id(each.prompts) not in checked:
            tokenizer = tokenizer or load_tokenizer(model, pretrained)
            check_distinct(each.prompts, tokenizer, each.alike)
            checked.append(id(each.prompts))


def _read(path: Path, name: str, loading: LoadingSettings, given: Prompts) -> list[EvaluationSet]:
    """Return the sets at a path, with the prompts that the user has given for all of their classes."""
    for reader in READERS:
        sets = reader(path, name, loading)
        for each in sets:
            if given and not each.retrieval and set(each.class_ids) <= set(given):
                each.prompts, each.classes = {c: given[c] for c in each.class_ids}, {}
                each.source = "--classes"
            each.source = each.source or each.layout
        if sets:
            return sets
    index = read_index(path, name, loading)
    each = EvaluationSet(index)
    if groups := _groups_of(path, index):
        each.groups = np.unique(groups, return_inverse=True)[1].astype(np.int64)
        each.grouped_by = "group"
    return [each]


def _groups_of(path: Path, index: Index) -> list[str]:
    """Return the field ``group`` of each picture in a table; nothing where it has no such column."""
    if path.suffix.lower() not in (".csv", ".tsv", ".txt", ".parquet") or not path.is_file():
        return []
    groups = read_groups(path)
    return [groups[Path(image)] for image in index.images] if groups else []


def _check(each: EvaluationSet, given: Prompts) -> None:
    """Refuse a set whose scores would mean nothing."""
    index = each.index
    if not len(index):
        raise UserError(f"'{each.name}' holds no pictures: check --eval_data.{each.name}")
    if each.retrieval:
        return
    if not each.classes:
        check_labels([index], each.prompts)
    if len(set(index.label_numbers.tolist())) < 2:
        raise UserError(
            f"all pictures of '{each.name}' are of one class ('{index.labels[0]}'): its accuracy would say "
            f"nothing "
            f"about telling classes apart, so add pictures of others or leave --eval_data.{each.name} out"
        )
    if len(each.class_ids) < 2:
        where = "--classes names" if given else f"'{each.name}' has"
        raise UserError(f"{where} one class: a classifier needs at least two, so give more in --classes")


def _share_prompts(sets: list[EvaluationSet]) -> None:
    """Let sets with equal prompts hold the same dictionary, whose text features are then computed once."""
    distinct: list[Prompts] = []
    for each in sets:
        same = next((p for p in distinct if p is each.prompts or p == each.prompts), None)
        if same is None:
            distinct.append(each.prompts)
        else:
            each.prompts = same
