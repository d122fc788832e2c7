"""The command ``index``: what a data set holds, in a few lines."""

from __future__ import annotations

from collections import Counter

import numpy as np

from tracer.data.build import read_index
from tracer.data.config import IndexConfig
from tracer.data.index import Index
from tracer.words import counted

SHOWN = 20  # faults that are named


def describe_data(config: IndexConfig) -> str:
    """Index a data set, and return its counts, formats, sizes and faults, a line each.

    Raises:
        UserError: it cannot be read, or holds no pictures.
    """
    return describe(read_index(config.data, None, config.loading, decode=config.decode))


def describe(index: Index) -> str:
    """Return the counts, formats, sizes and faults of a data set, a line each."""
    about, columns = index.about, index.columns
    labelled = int((columns.label >= 0).sum())
    names = Counter(about.names)
    shared = [name for name, count in names.items() if count > 1]
    lines = [
        f"{index.name}: {counted(len(index), 'picture')} in {counted(len(np.unique(columns.file)), 'file')}, "
        f"{about.bytes / 1e6:.1f} MB",
        f"classes: {len(about.classes)}, {counted(labelled, 'picture')} with a label"
        + (f"; names of several classes: {', '.join(shared[:5])}" if shared else ""),
        f"captions: {_captions(index)}",
        f"formats: {', '.join(f'{n} {name}' for name, n in sorted(about.formats.items())) or 'none'}",
        f"with an EXIF rotation: {about.turned}; of 16 bits a channel: {about.sixteen}",
        f"faults: {sum(about.reasons.values())} of {about.total}",
    ]
    lines += [f"  {count} × {reason}" for reason, count in Counter(about.reasons).most_common()]
    lines += [f"  '{fault.id}': {fault.reason}" for fault in about.faults[:SHOWN]]
    if len(about.faults) > SHOWN:
        lines.append(f"  and {sum(about.reasons.values()) - SHOWN} more")
    return "\n".join(lines)


def _captions(index: Index) -> str:
    """Say how many captions there are, and what the pictures without any get."""
    columns, templates = index.columns, len(index.templates)
    made = counted(templates, "template")
    has = columns.count > 0
    own = int(has.sum())
    if not own:
        return f"none; made from {made}"
    edges = np.zeros(len(columns.captions) + 1, np.int8)  # the captions of what is left out lie between them
    np.add.at(edges, columns.first[has], 1)
    np.add.at(edges, columns.first[has] + columns.count[has], -1)
    distinct = np.zeros(len(columns.texts), bool)
    distinct[columns.captions[edges.cumsum(dtype=np.int8)[:-1] > 0]] = True
    said = f"{int(columns.count.sum()):,} of {counted(own, 'picture')}, {int(distinct.sum()):,} distinct"
    return said if own == len(index) else f"{said}; made from {made} for the others"
