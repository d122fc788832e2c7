"""Reader of WebDataset shards: uncompressed tar files whose members are indexed, and later read, by offset.

The layouts are those of open_clip and img2dataset (shards in a folder, or a pattern with braces) and of
CLIP_benchmark (``classnames.txt``, ``zeroshot_classification_templates.txt``, ``<split>/nshards.txt``).
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from tracer.data.check import Sight, look
from tracer.data.names import SUFFIXES, is_hidden
from tracer.data.remote import ShardCache, address_of
from tracer.data.sample import Fault, Sample
from tracer.errors import UserError
from tracer.words import counted

TEXTS = {"txt", "json", "cls"}
LIMIT = 1 << 24  # bytes of a caption file; more is not one


class Shards(NamedTuple):
    """The shards of a data set: paths or addresses, and the folder with the files about their classes, if any."""

    files: list[str]
    folder: Path | None


class Member(NamedTuple):
    """A member of a tar file that is a regular file."""

    name: str
    offset: int
    size: int


def shards_of(source: Path) -> Shards | None:
    """Return the shards that ``source`` names: a folder, a tar file, or addresses or paths with brace patterns.

    Several patterns are divided by ``::``, as in open_clip. Returns None where it names none.

    Raises:
        UserError: a pattern has no closing brace, or names shards that are missing; a folder misses some, or
            holds several splits.
    """
    text = address_of(source) or str(source)
    if source.is_dir():
        return _in_folder(source)
    if not any(mark in text for mark in (".tar", "{", "::")) and address_of(source) is None:
        return None
    if source.is_file() and source.suffix not in (".tar", ".tgz", ".gz"):
        return None
    try:
        files = [file for part in text.split("::") for file in braceexpand(part)]
    except UnbalancedBracesError as error:
        raise UserError(
            f"data '{text}' has a brace that is not closed: write it as name-{{000..099}}.tar"
        ) from error
    files = [address_of(file) or file for file in files]
    local = [file for file in files if address_of(file) is None]
    missing = [file for file in local if not os.path.isfile(file)]
    if missing:
        if len(files) == 1:
            return None  # the caller says that it does not exist
        raise UserError(
            f"data '{text}' names {counted(len(files), 'shard')}, of which {len(missing):,} cannot be found, "
            f"first '{missing[0]}'"
        )
    parents = {Path(file).absolute().parent for file in local}
    return Shards(files, _about(parents.pop()) if len(parents) == 1 else None)


def _in_folder(source: Path) -> Shards | None:
    """Return the shards of a folder, or those of its only split in CLIP_benchmark's layout."""
    splits = sorted(path.parent for path in source.glob("*/nshards.txt"))
    if splits and not (source / "nshards.txt").is_file():
        if len(splits) > 1:
            names = ", ".join(f"'{path.name}'" for path in splits)
            raise UserError(f"'{source}' has the parts {names}: did you mean '{splits[0]}'?")
        return _in_folder(splits[0])
    files = sorted(str(path) for path in source.iterdir() if path.name.endswith((".tar", ".tar.gz", ".tgz")))
    count = source / "nshards.txt"
    if count.is_file():
        text = count.read_text().strip()
        if not text.isdecimal():
            raise UserError(f"'{count}' must hold the number of shards, not '{text[:40]}'")
        files = [str(source / f"{n}.tar") for n in range(int(text))]
        missing = [file for file in files if not os.path.isfile(file)]
        if missing:
            raise UserError(
                f"'{count}' counts {counted(len(files), 'shard')}, of which {len(missing):,} cannot be found, "
                f"first '{missing[0]}'"
            )
    return Shards(files, _about(source)) if files else None


def _about(folder: Path) -> Path:
    """Return the folder that has the files about the classes: that of the shards, or the one above."""
    names = ("classes.json", "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt")
    above = folder.parent
    has = any((folder / name).is_file() for name in names)
    return above if not has and any((above / name).is_file() for name in names) else folder


class Options(NamedTuple):
    """How shards are read: the field of ``json`` that the user names, and limits and depth of the first sight."""

    json_caption_key: str | None
    max_pixels: int
    whole: bool


def read_shards(
    shards: Shards, cache: ShardCache, options: Options, workers: int, done: Callable[[int], None]
) -> Iterator[tuple[Sample | Fault, Sight | None]]:
    """Yield the samples and the faults of all shards, in order, read by ``workers`` threads.

    Args:
        shards: from :func:`shards_of`.
        cache: local copies of remote shards.
        options: how they are read.
        workers: threads, each with a shard.
        done: is told how many samples a shard has, when it is read.
    """

    def read(file: str) -> list[tuple[Sample | Fault, Sight | None]]:
        handle = cache.open(file) if address_of(file) else os.open(file, os.O_RDONLY)
        with open(handle, "rb", buffering=0) as opened:
            return list(read_shard(file, opened, options))

    with ThreadPoolExecutor(workers) as pool:
        for content in pool.map(read, shards.files):
            yield from content
            done(len(content))


def read_shard(name: str, file: FileIO, options: Options) -> Iterator[tuple[Sample | Fault, Sight | None]]:
    """Yield what one shard holds: a sample for each key with a picture, and a fault for what cannot be used.

    Args:
        name: path or address of the shard, beside which an index of wds2idx may lie.
        file: the shard, or its local copy; it stays open, since others may remove a copy meanwhile.
        options: how it is read.

    Raises:
        UserError: it is compressed, or not a tar file.
    """
    handle = file.fileno()
    length = os.fstat(handle).st_size
    faults: list[Fault] = []
    groups: dict[str, dict[str, Member]] = {}
    for member in _members(name, file, faults):
        key, _, suffix = member.name.rpartition("/")[2].partition(".")
        key = f"{member.name.rpartition('/')[0]}/{key}".lstrip("/")
        suffix = suffix.lower()  # whole: x.depth.png is not the picture x.png
        group = groups.setdefault(key, {})
        if suffix in group:
            faults.append(Fault(f"{name}: {member.name}", "its name comes twice in the shard"))
        else:
            group[suffix] = member
    pictures = 0
    for key, group in groups.items():
        for sample, sight in _sample(name, key, group, handle, length, options):
            pictures += 1
            yield sample, sight
    yield from ((fault, None) for fault in faults)
    if not pictures:
        yield Fault(name, "the shard holds no pictures"), None


def _members(name: str, file: FileIO, faults: list[Fault]) -> Iterator[Member]:
    """Yield the regular files of a shard, from the index of wds2idx beside it, or from its headers."""
    start = os.pread(file.fileno(), 6, 0)
    if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\xfd7zXZ\0":
        raise UserError(
            f"shard '{name}' is compressed: samples are read by their offset, so unpack it once, with gunzip"
        )
    indexed = None if address_of(name) else _indexed(Path(name))
    for member in _scanned(name, file, faults) if indexed is None else indexed:
        reason = ""
        if member.name.startswith("/"):
            reason = "its name is an absolute path"
        elif ".." in PurePosixPath(member.name).parts:
            reason = "its name leads out of the shard with '..'"
        if reason:
            faults.append(Fault(f"{name}: {member.name}", reason))
        elif not is_hidden(PurePosixPath(member.name)):
            yield member


def _scanned(name: str, file: FileIO, faults: list[Fault]) -> Iterator[Member]:
    """Walk over the headers of a tar file; what is not a regular file is a fault, and so is a missing end."""
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isfile() and not member.issparse():
                    yield Member(member.name, member.offset_data, member.size)
                elif not member.isdir():
                    what = "a link" if member.islnk() or member.issym() else "not a regular file"
                    faults.append(Fault(f"{name}: {member.name}", f"it is {what}"))
                tar.members.clear()  # type: ignore[attr-defined] # or every header stays in memory
        # tarfile takes a cut header for the end.
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            faults.append(Fault(name, "the shard is cut off"))
    except tarfile.TarError as error:
        if os.fstat(file.fileno()).st_size == 0:
            faults.append(Fault(name, "the shard is empty"))
        elif "unexpected end of data" in str(error) or "truncated" in str(error):
            faults.append(Fault(name, "the shard is cut off"))
        else:
            raise UserError(f"shard '{name}' is not a tar file ({error}): copy it again") from error


def _indexed(shard: Path) -> list[Member] | None:
    """Read the index of wds2idx beside a shard: a line of ``suffix offset size name …`` for each sample.

    Returns None where there is none, or one that is older than the shard and may be another's.
    """
    path = shard.with_suffix(".idx")
    if not path.is_file() or path.stat().st_mtime_ns < shard.stat().st_mtime_ns:
        return None
    try:
        version, *lines = path.read_text().splitlines()
        if not version.startswith("v1.2"):
            return None
        members = []
        for line in lines:
            cells = line.split(" ")
            for n in range(0, len(cells), 4):
                _, offset, size, name = cells[n : n + 4]
                members.append(Member(name, int(offset), int(size)))
                if min(members[-1].offset, members[-1].size) < 0:
                    return None
        return members
    except ValueError:  # a name with blanks, or another file: the tar file itself tells
        return None


def _sample(
    shard: str, key: str, group: dict[str, Member], handle: int, length: int, options: Options
) -> Iterator[tuple[Sample | Fault, Sight | None]]:
    """Yield the sample of one key, or its fault; nothing where the key has no picture."""
    suffix = next((s for s in group if f".{s}" in SUFFIXES), None)
    if suffix is None:
        return
    picture, where = group[suffix], f"{shard}: {key}"
    cut = next((m for m in group.values() if m.offset + m.size > length), None)
    if cut is not None:
        yield Fault(where, "the shard is cut off in it"), None
        return

    def read(place: int, count: int) -> bytes:
        return os.pread(handle, count, picture.offset + place)

    try:
        texts = {s: _text(group[s], handle) for s in TEXTS & group.keys()}
        label, captions = _label(texts), _captions(texts, options.json_caption_key)
    except ValueError as error:
        yield Fault(where, str(error)), None
        return
    if label is None and not captions:
        yield Fault(where, "it has neither a label nor a caption"), None
        return
    sight = look(read, picture.size, options.max_pixels, options.whole)
    if sight.fault:
        yield Fault(where, sight.fault), None
    else:
        yield Sample(shard, label, captions, key, picture.offset, picture.size), sight


def _text(member: Member, handle: int) -> str:
    if member.size > LIMIT:
        raise ValueError(f"'{member.name}' has {member.size} bytes, too many for a caption")
    try:
        return os.pread(handle, member.size, member.offset).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"'{member.name}' is not text in UTF-8") from None


def _label(texts: dict[str, str]) -> str | None:
    return texts.get("cls", "").strip() or None


def _captions(texts: dict[str, str], json_key: str | None) -> list[str]:
    """Return the lines of ``txt``, else the field of ``json``; a field that the user names comes first."""
    if json_key is None:
        return _lines(texts) or _json_field(texts, "caption")
    return _json_field(texts, json_key) or _lines(texts)


def _lines(texts: dict[str, str]) -> list[str]:
    return [line for text in texts.get("txt", "").splitlines() if (line := text.strip())]


def _json_field(texts: dict[str, str], key: str) -> list[str]:
    if "json" not in texts:
        return []
    try:
        content = json.loads(texts["json"])
    except ValueError:
        raise ValueError("its json is not JSON") from None
    value = content.get(key) if isinstance(content, dict) else None
    items = value if isinstance(value, list) else [value]
    return [text for item in items if item is not None and (text := str(item).strip())]
