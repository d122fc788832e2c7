"""A check of every picture before a run, so that a damaged one is refused at once and not hours later."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from tracer.data.dali import VERSION, decode, undecodable
from tracer.data.index import Index
from tracer.data.picture import read_picture
from tracer.errors import UserError
from tracer.files import whole_file, write_json
from tracer.machine import compute_device

AT_ONCE = 8  # pictures held in memory at once, for each thread
PER_PIPELINE = 64  # pictures that one DALI pipeline decodes, for each thread: to build one takes time


def check_pictures(index: Index, cache: Path, workers: int) -> None:
    """Decode every picture once, by the decoder that trains, with ``workers`` threads.

    A data set that passed is remembered in the folder ``cache``, by its digest and the decoder, and not decoded
    again.

    Raises:
        UserError: some pictures cannot be decoded; the message counts them and names the first.
    """
    device = compute_device()
    key = hashlib.sha256(f"{index.digest()} DALI {VERSION} {device.type}".encode()).hexdigest()
    passed = cache / f"checked-{key[:16]}.json"
    if passed.is_file():
        return
    images = list(dict.fromkeys(index.images))
    damaged: dict[Path, str] = {}
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(images), desc=f"checking {index.name}", unit="picture", delay=1) as progress,
    ):
        for paths in _chunks(images, PER_PIPELINE * workers):
            damaged |= _faults(paths, pool, device, workers)
            progress.update(len(paths))
    if damaged:
        path, reason = next(iter(damaged.items()))
        raise UserError(
            f"{len(damaged)} of {len(images)} pictures of '{index.name}' cannot be decoded, "
            f"first '{path}' ({reason}): repair them or remove their rows"
        )
    with whole_file(passed) as part:
        write_json(part, {"pictures": len(index)})


def _chunks(paths: list[Path], size: int) -> Iterator[list[Path]]:
    return (paths[i : i + size] for i in range(0, len(paths), size))


def _faults(
    paths: list[Path], pool: ThreadPoolExecutor, device: torch.device, workers: int
) -> dict[Path, str]:
    """Return what is wrong with the pictures that cannot be decoded, by their path."""
    batches = (list(pool.map(read_picture, batch)) for batch in _chunks(paths, AT_ONCE * workers))
    files = ([p.encoded for p in batch if p.encoded is not None and not p.decoded] for batch in batches)
    try:
        decode(filter(None, files), device, workers, AT_ONCE * workers)
    except (UserError, RuntimeError):  # which does not say which pictures, so decode them one by one
        return undecodable(paths, device)
    return {}
