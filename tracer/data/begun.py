"""The index with which a run began, kept in the run's folder: what is lost later must not change the order.

An index that is read again after a file has vanished, or a shard was cut off, has fewer pictures, and so another
order. A run that goes on has the index of its beginning instead, and the lost pictures fail in it as they would
have failed in the unbroken run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tracer.data.check import look
from tracer.data.columns import About, Columns
from tracer.data.config import MAX_PIXELS
from tracer.data.content import content, of_pictures
from tracer.data.index import Index
from tracer.errors import UserError
from tracer.files import sync, whole_folder


def keep(index: Index, folder: Path, cache: Path) -> None:
    """Write an index and the digests of its pictures to a folder, unless that is there.

    Args:
        index: of the training data, when the run begins.
        folder: that is made.
        cache: see :func:`~tracer.data.content.content`.
    """
    if folder.is_dir():
        return
    with whole_folder(folder) as part:
        index.columns.save(part)
        np.save(part / "digests.npy", of_pictures(index, cache))
        index.about.save(part / "about.json", content=content(index, cache), used=index.templates)
        sync(part)


def begun(index: Index, folder: Path, cache: Path) -> Index:
    """Return the index that is kept in ``folder``, if ``index`` is what is left of it; else ``index`` itself.

    It is what is left where its pictures, with their labels and captions, are among those of the kept one in the
    same order, and none of the others, nor of those whose content is another one, can be used any more.

    Args:
        index: of the same source, read now.
        folder: of :func:`keep`.
        cache: see :func:`~tracer.data.content.content`.
    """
    try:
        about, more = About.load(folder / "about.json")
        columns, digests = Columns.load(folder), np.load(folder / "digests.npy")
        began, templates = more["content"], more["used"]
    except (OSError, ValueError, KeyError):  # there is none
        return index
    if content(index, cache) == began:
        return index
    kept = Index(index.name, columns, about, index.shards, templates, index.border, began)
    rows = _rows_of(index, kept)
    if rows is None or index.templates != kept.templates:
        return index
    unchanged = rows[digests[rows] == of_pictures(index, cache)]  # a kept index may name what was lost since
    lost = np.setdiff1d(np.arange(len(kept)), unchanged).tolist()
    return kept if lost and not any(_can_be_used(kept, row) for row in lost) else index


def _rows_of(index: Index, kept: Index) -> np.ndarray | None:
    """Return the row in ``kept`` of each picture of ``index``; None where one is new or is not as it was."""
    rows, place, now, then = [], 0, _described(index), _described(kept)
    for row in range(len(index)):
        name = index.id(row)
        while place < len(kept) and kept.id(place) != name:
            place += 1
        if place == len(kept) or then(place) != now(row):
            return None
        rows.append(place)
        place += 1
    return np.array(rows, np.int64)


def _described(index: Index) -> Callable[[int], object]:
    """Return what gives the class of a picture, its name and the captions."""
    labels, names, captions = index.labels, index.names, index.captions
    return lambda row: ((label := labels[row]), label and names[label], captions[row])


def _can_be_used(index: Index, row: int) -> bool:
    try:
        picture = index.read(row)
    except (OSError, UserError):
        return False
    whole = len(picture) >= int(index.columns.size[row])
    return whole and not look(lambda place, n: picture[place : place + n], len(picture), MAX_PIXELS).fault
