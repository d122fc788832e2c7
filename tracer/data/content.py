"""What a data set holds, as digests that its place and its time stamps do not change."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tracer.data.index import Index
from tracer.data.remote import address_of
from tracer.files import whole_file

END = 4096  # bytes that are read of each end of a picture
AT_ONCE = 4096  # pictures that a thread reads before it is given more
KEPT_FROM = 1000  # pictures: the digest of fewer is made in less time than anybody notices

_known: dict[str, np.ndarray] = {}  # digest with places and time stamps → digests of the pictures


def content(index: Index, cache: Path) -> str:
    """Return a digest of all labels, captions and pictures, in their order; see :func:`of_pictures`.

    That of an index with which a run began is the one of that time, whatever has been lost since.
    """
    if index.began:
        return index.began
    columns, digest = index.columns, hashlib.sha256(of_pictures(index, cache).tobytes())
    for column in (columns.label, columns.first, columns.count, columns.captions):
        digest.update(np.ascontiguousarray(column).data)
    for column in (columns.texts.blob, columns.texts.ends):
        digest.update(np.ascontiguousarray(column).data)
    digest.update(json.dumps([index.about.classes, index.about.names, index.templates]).encode())
    return digest.hexdigest()


def of_pictures(index: Index, cache: Path) -> np.ndarray:
    """Return a digest of each picture [N] uint64.

    A picture counts by its size and its first and last 4 KiB. A change in the middle alone that keeps the size
    is therefore not seen, and a data set is not read as a whole. A shard at an address counts by its address.

    Args:
        index: of the data set.
        cache: folder that keeps the digests of a large set until a path, size or time stamp changes.
    """
    stamped = index.digest()
    if stamped not in _known:
        path = cache / f"content-{stamped[:32]}.npy"
        if len(index) >= KEPT_FROM and path.is_file():
            _known[stamped] = np.load(path)
        else:
            with ThreadPoolExecutor() as threads:
                parts = threads.map(lambda first: _pictures(index, first), range(0, len(index), AT_ONCE))
                _known[stamped] = np.concatenate(list(parts))
            if len(index) >= KEPT_FROM:
                with whole_file(path) as part, part.open("wb") as file:
                    np.save(file, _known[stamped])
    return _known[stamped]


def _pictures(index: Index, first: int) -> np.ndarray:
    """Return the digests of the pictures of one thread's turn, from row ``first`` on."""
    columns, digests = index.columns, []
    opened: tuple[str, int] | None = None
    try:
        for row in range(first, min(first + AT_ONCE, len(index))):
            file = columns.files[int(columns.file[row])]
            offset, size = int(columns.offset[row]), int(columns.size[row])
            if address_of(file) is not None:
                digests.append(_digest(f"{file} {offset} {size}\n".encode("utf-8", "surrogateescape")))
                continue
            if opened is None or opened[0] != file:  # a shard's pictures follow each other
                if opened:
                    os.close(opened[1])
                opened = None
                try:
                    opened = file, os.open(file, os.O_RDONLY)
                except OSError:  # it has vanished; another picture will stand in
                    digests.append(_digest(b"gone\n"))
                    continue
            handle = opened[1]
            size = os.fstat(handle).st_size if size < 0 else size
            end = max(0, min(END, size - END))
            ends = os.pread(handle, min(END, size), offset), os.pread(handle, end, offset + size - end)
            digests.append(_digest(f"{size}\n".encode(), *ends))
    finally:
        if opened:
            os.close(opened[1])
    return np.array(digests, np.uint64)


def _digest(*parts: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(b"".join(parts), digest_size=8).digest(), "little")
