"""Files and folders that are either whole or absent: written aside, then renamed into place."""

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

from safetensors import SafetensorError

from tracer.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def aside(path: Path) -> Path:
    """Where ``path`` is written before it is whole."""
    return path.with_name(path.name + ".part")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; rename it to ``path`` on success, remove it on failure."""
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
    """The same for a folder. What an earlier, killed attempt left aside is removed first.

    Unless it holds something that matches the pattern ``keep``: then the attempt is taken up as it is, and a
    failure leaves it for the next.

    Raises:
        UserError: another process is at it.
    """
    part = aside(path)
    part.mkdir(parents=True, exist_ok=True)
    with _alone(part):
        if not (keep and any(part.glob(keep))):
            for entry in part.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        try:
            yield part
            part.replace(path)
        finally:
            if not (keep and any(part.glob(keep))):
                shutil.rmtree(part, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as a safetensors file, whole or not at all.

    Args:
        path: of the file; its folder is made where it is missing.
        tensors: on any device; their order decides nothing, their dtypes are kept.
        metadata: strings for the file's header.

    Raises:
        OSError: the file cannot be written; with the operating system's number and ``path``.
    """
    from safetensors.torch import save_file  # imports torch, which the other functions do without

    # Each tensor a storage of its own: the format refuses tied ones.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with whole_file(path) as part:
        try:
            save_file(own, part, metadata)
        except SafetensorError as error:  # the library's own word for what the operating system said
            number = re.search(r"os error (\d+)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error


def remove_folder(path: Path) -> None:
    """Remove a folder that an earlier attempt left.

    Raises:
        UserError: another process is at it.
    """
    with _alone(path):
        shutil.rmtree(path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock on ``folder`` that ends with the process, however that ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
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
