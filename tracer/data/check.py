"""A check of every picture before a run, so that a damaged one is refused at once and not hours later."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from tracer.data.index import Index
from tracer.errors import UserError
from tracer.files import whole_file, write_json

FORMATS = {"JPEG", "PNG", "WEBP", "BMP", "TIFF"}  # what both PIL and DALI decode


def check_pictures(index: Index, cache: Path, workers: int) -> None:
    """Decode every picture once, with ``workers`` threads.

    A data set that passed is remembered in the folder ``cache`` by its digest, and not decoded again.

    Raises:
        UserError: some pictures cannot be decoded; the message counts them and names the first.
    """
    passed = cache / f"checked-{index.digest()[:16]}.json"
    if passed.is_file():
        return
    with ThreadPoolExecutor(workers) as pool:
        faults = pool.map(_fault, index.images)  # PIL decodes without the GIL
        progress = tqdm(faults, total=len(index), desc=f"checking {index.name}", unit="picture", delay=1)
        damaged = [(path, fault) for path, fault in zip(index.images, progress, strict=True) if fault]
    if damaged:
        path, fault = damaged[0]
        raise UserError(
            f"{len(damaged)} of {len(index)} pictures of '{index.name}' cannot be decoded, "
            f"first '{path}' ({fault}): repair them or remove their rows"
        )
    with whole_file(passed) as part:
        write_json(part, {"pictures": len(index)})


def _fault(path: Path) -> str | None:
    """Return why the picture cannot be decoded, or None."""
    try:
        with Image.open(path) as picture:
            if picture.format not in FORMATS:
                return f"{picture.format} is not supported, use {', '.join(sorted(FORMATS))}"
            picture.load()
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more for damaged files
        return str(error) or type(error).__name__
    return None
