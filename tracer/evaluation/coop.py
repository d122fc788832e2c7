"""CoOp's splits of a data set, ``split_zhou_*.json``: the pictures of each part with their classes and names."""

from __future__ import annotations

import json
from pathlib import Path

from tracer.data.build import index_samples
from tracer.data.config import LoadingSettings
from tracer.data.sample import Sample
from tracer.data.text import TEMPLATE, words
from tracer.errors import UserError
from tracer.evaluation.prompts import class_prompts
from tracer.evaluation.sets import EvaluationSet

PARTS = ("train", "val", "test")


def read_coop(path: Path, name: str, loading: LoadingSettings) -> list[EvaluationSet]:
    """Return the pictures of a part of ``split_zhou_*.json`` (CoOp, arXiv 2109.01134); none for another path.

    Args:
        path: the file, of which the part test is read, or ``file:PART``. Pictures lie below its folder, or below
            one of the folders in it.
        name: of the set.
        loading: how pictures are read.

    Raises:
        UserError: the file or the part is not as CoOp writes it, or its pictures are not there.
    """
    file, colon, part = str(path).rpartition(":")
    if not colon or path.is_file():
        file, part = str(path), "test"
    source = Path(file)
    if not source.name.startswith("split_") or source.suffix != ".json" or not source.is_file():
        return []
    if part not in PARTS:
        raise UserError(
            f"--eval_data.{name} {path}: there is no split '{part}': the splits are {', '.join(PARTS)}"
        )
    try:
        parts = json.loads(source.read_text(encoding="utf-8-sig"))
        rows = [(str(picture), int(label), str(title)) for picture, label, title in parts[part]]
        title_of = {label: title for each in PARTS for _, label, title in parts.get(each, [])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{source}' is not a split of CoOp's ({error!r}): it holds train, val and test, each a list of "
            "[picture, class number, class name]"
        ) from error
    if not rows:
        raise UserError(
            f"'{source}' has no pictures in the split '{part}': give another of {', '.join(PARTS)}"
        )
    folders = [source.parent, *sorted(p for p in source.parent.iterdir() if p.is_dir())]
    below = next((folder for folder in folders if (folder / rows[0][0]).is_file()), source.parent)
    index = index_samples(name, [Sample(str(below / p), str(n), ()) for p, n, _ in rows], loading)
    names = {str(n): words(title) for n, title in sorted(title_of.items())}
    return [
        EvaluationSet(
            index, "CoOp split", len(rows), prompts=class_prompts(None, list(names), names, [TEMPLATE])
        )
    ]
