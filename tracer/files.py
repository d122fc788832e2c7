"""Write files and folders so that they are either whole or absent: beside their place, then renamed into it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from tracer.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def aside(path: Path) -> Path:
    """Return the path beside ``path`` at which it is written until it is whole."""
    return path.with_name(path.name + ".part")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; rename it to ``path`` on success, remove it on failure.

    Missing parent folders are made. The data is on the disk before the file gets its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = aside(path)
    try:
        yield part
        sync(part)  # else a loss of power could leave the new name on an empty file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, keep: str | None = None) -> Iterator[Path]:
    """Yield a folder beside ``path`` to write to; rename it to ``path`` on success, remove it on failure.

    Files that a killed attempt left in that folder are removed first. A folder that holds a file or folder
    matching the pattern ``keep`` is not emptied but continued, and a failure leaves it for the next attempt.

    Raises:
        UserError: another process is writing it.
    """
    part = aside(path)
    part.mkdir(parents=True, exist_ok=True)

    def kept() -> bool:
        return keep is not None and any(part.glob(keep))

    with _locked(part):
        if not kept():
            for entry in part.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        try:
            yield part
            part.replace(path)
        finally:
            if not kept():
                shutil.rmtree(part, ignore_errors=True)


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
        except SafetensorError as error:  # the library words the system's error in its own way
            number = re.search(r"os error (\d+)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error


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


def remove_folder(path: Path) -> None:
    """Remove a folder that an earlier attempt left.

    Raises:
        UserError: another process is writing it.
    """
    with _locked(path):
        shutil.rmtree(path)


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
