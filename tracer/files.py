"""Write files and folders so that they are either whole or absent: beside their place, then renamed into it.

Nothing is emptied, removed or replaced that this program has not made.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

import tracer
from tracer.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


MARK = ".tracer"  # the file in every folder of this program's; it alone allows to empty or remove the folder


def cache_folder() -> Path:
    """Return the user's folder for what can be made again: ``$XDG_CACHE_HOME/tracer``, or ``~/.cache/tracer``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tracer"


def aside(path: Path) -> Path:
    """Return the path beside ``path`` at which a folder is written until it is whole."""
    return path.with_name(path.name + ".part")


def file_aside(path: Path) -> Path:
    """Return the path beside ``path`` at which a file is written until it is whole.

    A file cannot hold a mark, so this name is one: it is hidden and says whose it is.
    """
    return path.with_name(f".{path.name}.tracer-part")


def is_marked(folder: Path) -> bool:
    """Return whether this program made the folder; never so for a link."""
    return folder.is_dir() and not folder.is_symlink() and (folder / MARK).is_file()


def check_output(path: Path) -> None:
    """Refuse a path at which no new file or folder can be made; call it before the work, which may take long.

    Nothing is left behind.

    Raises:
        UserError: there is something at ``path``, or its folder cannot be made or written to.
    """
    if os.path.lexists(path):
        raise UserError(f"'{path}' exists: choose another --output or remove it")
    parent = path.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    _probe(parent, path)


def _probe(folder: Path, path: Path) -> None:
    """Make and remove a folder in ``folder``, under a name at least as long as ``path`` needs."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be written ({error.strerror or error}: '{folder}'): choose another --output"
        ) from error


def check_folder(path: Path) -> None:
    """Refuse a folder that this program could not claim; nothing is left behind.

    Raises:
        UserError: it is not a folder, holds what this program has not made, or cannot be made or written to.
    """
    if not os.path.lexists(path):
        check_output(path)
        return
    empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if not empty and not is_marked(path):
        raise _foreign(path, "choose another --output")
    _probe(path, path)


def claim_folder(path: Path) -> None:
    """Make ``path`` a folder of this program's, so that files in it may be replaced; see :func:`check_folder`."""
    check_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    _mark(path)


@contextmanager
def whole_file(path: Path, may_replace: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; rename it to ``path`` on success, remove it on failure.

    Missing parent folders are made. The data is on the disk before the file gets its name.

    Args:
        path: of the file.
        may_replace: says of a file that is at ``path`` by then whether it may be replaced; default: always.

    Raises:
        UserError: the file is whole but may not or cannot have its name; the message says where it stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = file_aside(path)
    part.unlink(missing_ok=True)  # of a killed attempt; writing into it would follow a link
    try:
        yield part
        sync(part)  # else a loss of power could leave the new name on an empty file
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if may_replace is not None and os.path.lexists(path) and not may_replace(path):
        raise _kept(path, part)
    try:
        part.replace(path)
    except OSError as error:
        raise _kept(path, part, error) from error


@contextmanager
def whole_folder(path: Path, keep: str | None = None) -> Iterator[Path]:
    """Yield a folder beside ``path`` to write to; rename it to ``path`` on success, remove it on failure.

    The folder is marked as this program's (:data:`MARK`) and stays so. Files that a killed attempt left in it
    are removed first. A folder that holds a file or folder matching the pattern ``keep`` is not emptied but
    continued, and a failure leaves it for the next attempt.

    Raises:
        UserError: another process is writing it; there is something at its place that this program has not made;
            or it is whole but cannot have its name, and the message says where it stays.
    """
    part = aside(path)
    if os.path.lexists(part):
        check_ours(part)
    else:
        part.mkdir(parents=True)
        _mark(part)

    def kept() -> bool:
        return keep is not None and any(part.glob(keep))

    with _locked(part):
        if not kept():
            _empty(part)
        try:
            yield part
        except BaseException:
            if not kept():
                remove_tree(part)
            raise
        if os.path.lexists(path):
            raise _kept(path, part)
        try:
            part.rename(path)
        except OSError as error:
            raise _kept(path, part, error) from error


def check_ours(folder: Path) -> None:
    """Raise UserError for a file, a link or a folder that this program has not made."""
    if not is_marked(folder):
        raise _foreign(
            folder, "rename it, remove it if an earlier version of tracer made it, or choose another --output"
        )


def remove_folder(path: Path) -> None:
    """Remove a folder that an earlier attempt left.

    Raises:
        UserError: another process is writing it, or this program has not made it.
    """
    check_ours(path)
    with _locked(path):
        remove_tree(path)


def remove_tree(folder: Path) -> None:
    """Remove a folder of this program's, its mark last: an attempt that is killed meanwhile can be repeated."""
    _empty(folder)
    shutil.rmtree(folder)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != MARK:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _mark(folder: Path) -> None:
    (folder / MARK).write_text(f"made by tracer {tracer.__version__}\n")


def _foreign(path: Path, remedy: str) -> UserError:
    return UserError(f"'{path}' was not made by tracer (it holds no '{MARK}'): {remedy}")


def _kept(path: Path, part: Path, error: OSError | None = None) -> UserError:
    why = (error.strerror or str(error)) if error else "it has appeared meanwhile"
    return UserError(
        f"'{path}' cannot be written ({why}): the finished work is in '{part}', rename it to keep it"
    )


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as strict JSON.

    Raises:
        ValueError: it holds NaN or an infinite number, for which JSON has no name.
    """
    path.write_text(json.dumps(value, indent=1, allow_nan=False))


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces: weights may be larger than the memory that is free."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as a safetensors file, whole or not at all.

    Args:
        path: of the file; missing parent folders are made.
        tensors: name → tensor, on any device; the file keeps its dtype.
        metadata: strings for the file's header.

    Raises:
        OSError: the file cannot be written; holds the operating system's error number and ``path``.
    """
    from safetensors.torch import save_file  # imports torch, which the other functions do not need

    # The format refuses tied tensors, so each gets a storage of its own.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with whole_file(path) as part:
        try:
            save_file(own, part, metadata)
            part.chmod(0o666 & ~_umask())  # the library keeps its files from everybody else
            _sort_metadata(part)
        except SafetensorError as error:  # the library words the system's error in its own way
            number = re.search(r"os error (\d+)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error


def _umask() -> int:
    """Return the process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a file, which safetensors writes in random order: equal runs make equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) <= size:  # as long as the library's own, blanks at the end apart
                file.seek(8)
                file.write(text.ljust(size))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        ValueError: there is no such file, or it is not a complete safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"'{path}' does not exist: check the path")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"'{path}' is not a complete safetensors file ({error}): copy it again") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on ``folder``. The system drops it when the process ends, however that happens."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have no locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another process is writing '{folder}': wait until it has ended") from error
        yield
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all that it holds, would survive a loss of power."""
    for entry in (*(path.rglob("*") if path.is_dir() else ()), path):
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
