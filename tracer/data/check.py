"""A look at every picture before a run: a damaged one is named now, not in its middle."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from tracer.data.index import Index
from tracer.errors import UserError
from tracer.files import whole_file

FORMATS = {"JPEG", "PNG", "WEBP", "BMP", "TIFF"}  # what DALI decodes of what PIL reads


def check_pictures(index: Index, cache: Path, workers: int) -> None:
    """Decode every picture once, so that a damaged one is named now and not in the middle of a run.

    What was found whole is remembered in ``cache``.

    Raises:
        UserError: naming the pictures that cannot be decoded.
    """
    done = cache / f"checked-{index.digest()[:16]}.json"
    if done.is_file():
        return
    with ThreadPoolExecutor(workers) as pool:
        faults = pool.map(_fault, index.images)  # PIL decodes without the GIL
        progress = tqdm(faults, total=len(index), desc=f"checking {index.name}", unit="picture", delay=1)
        bad = [(p, fault) for p, fault in zip(index.images, progress, strict=True) if fault]
    if bad:
        path, fault = bad[0]
        raise UserError(
            f"{len(bad)} of {len(index)} pictures of '{index.name}' cannot be decoded, "
            f"first '{path}' ({fault}): repair them or remove their rows"
        )
    with whole_file(done) as part:
        part.write_text(json.dumps({"pictures": len(index)}))


def _fault(path: Path) -> str | None:
    try:
        with Image.open(path) as picture:
            if picture.format not in FORMATS:
                return f"{picture.format} is not supported, use {', '.join(sorted(FORMATS))}"
            picture.load()
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more for damaged files
        return str(error) or type(error).__name__
    return None
