"""Building an index from any source, and keeping it for the next time."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from tqdm import tqdm

from tracer.data.check import Sight, look_at_file
from tracer.data.columns import About, Builder, Columns
from tracer.data.config import LoadingSettings
from tracer.data.folder import folders_of, read_folder
from tracer.data.index import Index
from tracer.data.names import note
from tracer.data.remote import ShardCache, address_of, copy_there
from tracer.data.sample import Fault, Sample
from tracer.data.shards import Options, Shards, read_shards, shards_of
from tracer.data.table import read_table
from tracer.data.text import TEMPLATE, read_names, read_templates, sorted_ids, words
from tracer.errors import UserError
from tracer.files import is_marked, remove_tree, whole_folder
from tracer.words import counted

VERSION = 1  # of the index's files
KEPT_FROM = 1000  # samples: a smaller index is built in less time than anybody notices
AT_ONCE = 256  # files that a thread looks at before it is given more
TEMPLATES_FILE = "zeroshot_classification_templates.txt"  # CLIP_benchmark's
ABOUT_CLASSES = ("classes.json", "classnames.txt", TEMPLATES_FILE)

Stamps = list[list[Any]]  # path, size and time of change of everything an index was made of


def read_index(
    source: Path | str,
    name: str | None = None,
    settings: LoadingSettings | None = None,
    *,
    decode: bool = False,
) -> Index:
    """Index a folder, a table or shards, or map the index of an earlier time into memory.

    Args:
        source: folder with a sub-folder per class, CSV, TSV or Parquet file, or WebDataset shards.
        name: name of the index; default: that of the source without its suffix.
        settings: how it is read, and the folder that keeps the index; default: the defaults, and nothing is kept.
        decode: decode every picture, in place of the suspects alone.

    Raises:
        UserError: the source does not exist or cannot be read, holds no pictures, or more of them than
            ``settings.max_bad`` allows cannot be used.
    """
    source, chosen = Path(source), settings or LoadingSettings()
    cache = ShardCache(chosen.cache / "shards", int(chosen.cache_gb * 1e9))
    name = name or _name(source)
    if settings is None:
        columns, about, _ = _build(source, chosen, cache, _on_disk, decode)
    else:
        columns, about = _kept(source, chosen, cache, decode)
    if not about.total:
        raise UserError(
            f"data '{source}' holds no pictures: a table needs at least one row below its header, "
            "a folder needs <class>/<picture>, a shard a picture with a caption or a class"
        )
    _judge(name, about, chosen.max_bad)
    return Index(name, columns, about, cache, about.templates or [TEMPLATE])


def index_samples(name: str, samples: Iterable[Sample], settings: LoadingSettings) -> Index:
    """Index what a reader of a floor above yields: look at every picture, as :func:`read_index` does.

    Nothing is kept in the cache.

    Raises:
        UserError: there are no pictures, or more of them than ``settings.max_bad`` allows cannot be used.
    """
    index = collect(name, samples)
    about = index.about
    columns = _look(index.columns, about, settings, decode=False)
    about.bytes = _bytes(columns)
    if not len(index):
        raise UserError(f"'{name}' holds no pictures")
    _judge(name, about, settings.max_bad)
    return replace(index, columns=columns)


def collect(name: str, samples: Iterable[Sample]) -> Index:
    """Return the index of samples that nobody looks at first."""
    builder = Builder(lambda _: io.BytesIO())
    for sample in samples:
        builder.add(sample)
    columns, labels = builder.columns()
    about = About(total=len(builder))
    columns = _number_classes(columns, labels, None, about)
    return Index(name, columns, about)


def check_sources(sources: Iterable[Path]) -> None:
    """Raise UserError for the first source that does not exist; it is not opened."""
    for source in sources:
        if not source.is_dir() and not source.is_file() and shards_of(source) is None:
            raise UserError(
                f"data '{source}' does not exist: give a folder of class folders, a CSV file or other table, "
                "or shards"
            )


def _name(source: Path) -> str:
    """Return what a source is called where the user gives no name."""
    name = source.absolute().name
    if "{" in name:
        name = name.partition("{")[0].rstrip("-_") or source.absolute().parent.name
    return Path(name).stem


def _judge(name: str, about: About, max_bad: float) -> None:
    """Note the faults of a data set, or refuse it for them."""
    bad = sum(about.reasons.values())
    if not bad:
        return
    report = f"{bad} of {counted(about.total, 'picture')} of '{name}' cannot be used: {faults_of(about)}"
    if max_bad < 1 and (bad == about.total or bad > max_bad * about.total):
        raise UserError(
            f"{report}; that is more than --max_bad {max_bad:g} allows: repair the files or remove their rows"
        )
    note(f"{report}; {'it is' if bad == 1 else 'they are'} left out")


def faults_of(about: About) -> str:
    """Return the faults by reason, each with its count and its first picture."""
    first = {fault.reason: fault.id for fault in reversed(about.faults)}
    parts = [
        f"{count} ({reason}), first '{first[reason]}'" if reason in first else f"{count} ({reason})"
        for reason, count in Counter(about.reasons).most_common(5)
    ]
    more = len(about.reasons) - len(parts)
    return "; ".join(parts + [f"{more} more reasons"] * (more > 0))


def _kept(source: Path, settings: LoadingSettings, cache: ShardCache, decode: bool) -> tuple[Columns, About]:
    """Return the index that is kept for this source, built anew where anything has changed since."""
    where = address_of(source) or os.path.abspath(source)
    key = json.dumps([VERSION, where, settings.json_caption_key, settings.max_pixels])
    folder = settings.cache / f"index-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    with _alone(Path(tempfile.gettempdir()) / f"tracer-{os.getuid()}-{folder.name}.lock"):
        if (kept := _valid(folder, decode)) is not None:
            return kept
        columns, about, stamps = _build(source, settings, cache, _on_disk, decode)
        unnamed = sum(about.reasons.values()) > len(
            about.faults
        )  # whose repair only a shard's time would tell
        if about.total < KEPT_FROM or (unnamed and shards_of(source) is None):
            return columns, about
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_suffix(".lock")):  # another host may share the folder
            if is_marked(folder):
                remove_tree(folder)
            with whole_folder(folder) as part:
                columns.save(part)
                about.save(part / "about.json", stamps=stamps, decoded=decode, source=where)
            return Columns.load(folder), about


def _valid(folder: Path, decode: bool) -> tuple[Columns, About] | None:
    """Return the index in ``folder`` if nothing that it was made of has changed since."""
    if not is_marked(folder):
        return None
    about, more = About.load(folder / "about.json")
    if more["decoded"] < decode or more["stamps"] != [_stamp(path) for path, *_ in more["stamps"]]:
        return None
    return Columns.load(folder), about


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock: of several processes that want the same index one builds it, and the others wait."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _on_disk(_: str) -> BinaryIO:
    """Open a file that vanishes when it is closed: texts may be larger than the memory."""
    return cast(BinaryIO, tempfile.TemporaryFile())


def _stamp(path: str) -> list[Any]:
    try:
        about = os.stat(path)
    except OSError:
        return [path, -1, -1]
    return [path, -1 if os.path.isdir(path) else about.st_size, about.st_mtime_ns]


def _build(
    source: Path,
    settings: LoadingSettings,
    cache: ShardCache,
    scratch: Callable[[str], BinaryIO],
    decode: bool,
) -> tuple[Columns, About, Stamps]:
    """Read a source, look at every picture, and return its columns, what it is about, and what it was made of."""
    builder, about = Builder(scratch), About()
    shards = shards_of(source)
    with tqdm(desc=f"indexing {source.name}", unit="sample", delay=1) as bar:
        for item, sight in _items(source, shards, settings, cache, decode, bar.update):
            if isinstance(item, Fault):
                about.fault(item)
                about.total += 1
            elif builder.add(item) is None:
                about.fault(Fault(item.file, "it has several labels"))
                about.total += 1
            elif sight is not None:
                about.saw(sight)
            if shards is None:
                bar.update()
    columns, labels = builder.columns()
    about.total += len(columns.file)
    with _about_classes(source, shards) as folder:
        columns = _number_classes(columns, labels, folder, about)
        if folder is not None and (folder / TEMPLATES_FILE).is_file():
            about.templates = read_templates(folder / TEMPLATES_FILE)
    if shards is None:
        columns = _look(columns, about, settings, decode)
    about.bytes = _bytes(columns)
    return columns, about, _stamps(source, shards, about)


@contextmanager
def _about_classes(source: Path, shards: Shards | None) -> Iterator[Path | None]:
    """Give the folder with the files about the classes, if any; those of shards at an address are copied."""
    if shards is None:
        yield source if source.is_dir() else None
        return
    parents = {(address_of(file) or "").rpartition("/")[0] for file in shards.files}
    parent = parents.pop() if len(parents) == 1 else ""
    if not parent or "?" in parent:
        yield shards.folder
        return
    with tempfile.TemporaryDirectory() as folder:
        places = [where for where in (parent, parent.rpartition("/")[0]) if "://" in where]
        has_files = any(copy_there(where, ABOUT_CLASSES, Path(folder)) for where in places)
        yield Path(folder) if has_files else None


def _items(
    source: Path,
    shards: Shards | None,
    settings: LoadingSettings,
    cache: ShardCache,
    decode: bool,
    done: Callable[[int], Any],
) -> Iterator[tuple[Sample | Fault, Sight | None]]:
    """Choose the reader by what the source is; a new format is a new file and a branch here."""
    if shards is not None:
        options = Options(settings.json_caption_key, settings.max_pixels, decode)
        yield from read_shards(shards, cache, options, settings.workers, done)
        return
    check_sources([source])
    for item in read_folder(source) if source.is_dir() else read_table(source):
        yield item, None


def _number_classes(columns: Columns, labels: list[str], folder: Path | None, about: About) -> Columns:
    """Number the classes as the data set does, or in sorted order, and set their names."""
    present = sorted_ids(labels)
    given = read_names(folder, present) if folder is not None else None
    about.classes, about.names = given or (present, [words(label) for label in present])
    about.named = given is not None
    number = {label: n for n, label in enumerate(about.classes)}
    new = np.array([number[label] for label in labels] + [-1], np.int32)
    columns.label = new[columns.label]
    return columns


def _look(columns: Columns, about: About, settings: LoadingSettings, decode: bool) -> Columns:
    """Look at every picture file, set the stamps, and leave out the samples of those that cannot be used."""
    good = np.ones(len(columns.files), bool)

    def some(start: int) -> list[tuple[Sight, int, int]]:
        numbers = range(start, min(start + AT_ONCE, len(columns.files)))
        return [look_at_file(columns.files[n], settings.max_pixels, decode) for n in numbers]

    with (
        ThreadPoolExecutor(settings.workers) as pool,
        tqdm(total=len(columns.files), desc="looking at pictures", unit="file", delay=1) as bar,
    ):
        number = 0
        for seen in pool.map(some, range(0, len(columns.files), AT_ONCE)):
            for sight, size, time in seen:
                columns.stamps[number] = size, time
                if sight.fault:
                    about.fault(Fault(columns.files[number], sight.fault))
                    good[number] = False
                else:
                    about.saw(sight)
                number += 1
            bar.update(len(seen))
    kept = good[columns.file]
    return columns if kept.all() else columns.take(np.flatnonzero(kept))


def _bytes(columns: Columns) -> int:
    """Return the size of all pictures together."""
    alone = columns.size < 0
    return int(columns.size[~alone].sum() + columns.stamps[columns.file[alone], 0].sum())


def _stamps(source: Path, shards: Shards | None, about: About) -> Stamps:
    """Return what an index was made of; faulty pictures count too, since a user repairs them."""
    folder = shards.folder if shards else (source if source.is_dir() else None)
    if shards is not None:
        paths = [file for file in shards.files if address_of(file) is None]
        paths += [str(Path(file).with_suffix(".idx")) for file in paths]
        paths += sorted({str(Path(file).parent / "nshards.txt") for file in paths})
        paths += [str(source)] if source.is_dir() else []
    else:
        paths = folders_of(source) if source.is_dir() else [str(source)]
    if folder is not None:
        paths += [str(folder / name) for name in ABOUT_CLASSES]
    paths += [fault.id for fault in about.faults if shards is None]
    return [_stamp(path) for path in dict.fromkeys(paths)]
