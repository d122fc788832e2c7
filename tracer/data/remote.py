"""Shards at an address: whole files, copied into a bounded folder when they are first needed."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from tracer.errors import UserError

ATTEMPTS, PAUSE, TIMEOUT = 3, 0.2, 60  # tries of a download, seconds between them, seconds without a byte
PART = ".tracer-part-"  # begins the names of copies that are not whole
STALE = 3600.0  # seconds without a byte after which such a copy counts as left by a killed process
PIECE = 1 << 20


def address_of(source: Path | str) -> str | None:
    """Return the address in a setting, or None for a path. ``Path`` has merged the slashes behind ``:``."""
    scheme, colon, rest = str(source).partition(":/")
    if not colon or "/" in scheme or not re.fullmatch(r"[a-z][a-z0-9+.-]+", scheme):
        return None
    root = "/" if scheme in ("file", "local") else ""
    return f"{scheme}://{root}{rest.lstrip('/')}"


class MissingError(UserError):
    """There is nothing at an address, or nothing that may be read."""


class ShardCache:
    """Local copies of remote shards, the least recently used of which make room for others.

    Several processes and several caches may share a folder: a copy gets its name when it is whole, and who has
    opened one keeps it while others make room.

    Args:
        folder: of the copies.
        limit: bytes that they may take; one shard is kept whatever its size.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._guard, self._locks = threading.Lock(), defaultdict(threading.Lock)  # type: ignore[var-annotated]

    def open(self, address: str) -> int:
        """Open the local copy of a shard for reading, fetched if it is not there; return its file descriptor.

        Raises:
            UserError: the address cannot be read, after several tries; names the reason.
            OSError: the copy cannot be written or read.
        """
        name = f"{hashlib.sha256(address.encode()).hexdigest()[:20]}-{address.rpartition('/')[2][:80]}"
        copy = self.folder / name
        with self._guard:
            lock = self._locks[name]
        with lock:  # of several threads that want a shard one fetches it
            while True:
                with suppress(FileNotFoundError):  # not there, or others made room before it was open
                    handle = os.open(copy, os.O_RDONLY)
                    now = time.time_ns()  # finer than the file system's own clock
                    os.utime(handle, ns=(now, now))
                    return handle
                self._fetch(address, copy)
                self._make_room(copy)

    def _fetch(self, address: str, copy: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # A name of its own: other processes, and another cache of this one, may fetch the same shard.
        part = self.folder / f"{PART}{uuid.uuid4().hex}"
        try:
            with part.open("xb") as file:
                fetch(address, file)
            part.replace(copy)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, newest: Path) -> None:
        """Remove what a killed process left half-fetched, and copies beyond the limit, the oldest first."""
        stats = {}
        for copy in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process made room
                stats[copy] = copy.stat()
        for part in [path for path in stats if path.name.startswith(PART)]:
            if time.time() - stats.pop(part).st_mtime > STALE:
                part.unlink(missing_ok=True)
        used = sum(about.st_size for about in stats.values())
        for copy in sorted(stats.keys() - {newest}, key=lambda p: stats[p].st_mtime):
            if used <= self.limit:
                break
            copy.unlink(missing_ok=True)  # who reads it keeps it open
            used -= stats[copy].st_size


def fetch(address: str, file: BinaryIO) -> None:
    """Copy what is at an address into a file, in several tries.

    Raises:
        UserError: the address cannot be read; names the reason. MissingError: there is nothing.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            file.seek(0)
            file.truncate()
            download(address, file)
            return
        except UserError:
            raise
        except Exception as error:  # each protocol raises its own
            if attempt == ATTEMPTS:
                what = " ".join(str(error).split()) or type(error).__name__
                raise UserError(
                    f"'{address}' could not be read in {ATTEMPTS} tries ({what}): check the address "
                    "and the server"
                ) from error
            time.sleep(PAUSE * attempt)


def copy_there(address: str, names: Iterable[str], folder: Path) -> bool:
    """Copy those of some small files that are in a folder at an address; return whether there are any.

    Raises:
        UserError: the server fails, so that nobody knows whether they are there.
    """
    copied = 0
    for name in names:
        content = io.BytesIO()
        with suppress(MissingError):
            fetch(f"{address}/{name}", content)
            if content.getvalue().lstrip()[:1] != b"<":  # a page that says that there is nothing
                (folder / name).write_bytes(content.getvalue())
                copied += 1
    return copied > 0


def download(address: str, file: BinaryIO) -> None:
    """Copy what is at an address into a file; HTTP by the standard library, other protocols by fsspec.

    fsspec's own HTTP needs aiohttp, which this package does not.

    Raises:
        MissingError: there is nothing at the address, or nothing that may be read.
        UserError: its protocol needs a package that is missing.
        OSError: the connection failed or ended too early.
    """
    if address.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
                shutil.copyfileobj(answer, file, PIECE)
                expected = answer.headers.get("Content-Length")
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404, 410):
                raise MissingError(
                    f"'{address}' cannot be read: the server answers {error.code} ({error.reason}): "
                    "check the address"
                ) from error
            raise
        if expected is not None and file.tell() != int(expected):
            raise OSError(f"the server stopped after {file.tell()} of {expected} bytes")
        return
    fsspec: Any = __import__("fsspec")
    try:
        with fsspec.open(address, "rb") as source:
            shutil.copyfileobj(source, file, PIECE)
    except FileNotFoundError as error:
        raise MissingError(f"'{address}' cannot be read: there is no such file: check the address") from error
    except PermissionError as error:  # as S3 answers who may not list what is there
        raise MissingError(f"'{address}' cannot be read: access is denied: check the address") from error
    except (ImportError, ValueError) as error:  # a protocol that is unknown, or whose package is missing
        raise UserError(f"'{address}' cannot be read: {' '.join(str(error).split())}") from error
