"""The same 300 pictures as a folder, a table and shards, 3 % of them spoiled in ten ways."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tracer.data.order import Order

PICTURES, BATCH, SEED = 300, 16, 0


def jpeg(n: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(n).integers(0, 256, (36 + n % 9, 48, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG", quality=90)
    return file.getvalue()


def png(n: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg(n))).save(file, form)
    return file.getvalue()


def picture(n: int) -> bytes:
    """A good picture; the content decides its format, and not the suffix."""
    form = {3: "WEBP", 5: "BMP", 6: "GIF", 8: "PNG"}.get(n % 10)
    return png(n, form) if form else jpeg(n)


def silent(content: bytes) -> bytes:
    """Damage a PNG so that only decoding notices: header and end stay."""
    start = content.index(b"IDAT") + 4
    return content[:start] + bytes(20) + content[start + 20 :]


def flipped(content: bytes) -> bytes:
    """Damage a JPEG so that no decoder notices."""
    middle = len(content) // 2
    return content[:middle] + bytes(b ^ 0x10 for b in content[middle : middle + 4]) + content[middle + 4 :]


def bomb(content: bytes) -> bytes:
    """A JPEG whose header promises 60,000×60,000 pixels."""
    frame = content.index(b"\xff\xc0")
    return content[: frame + 5] + b"\xea\x60\xea\x60" + content[frame + 9 :]


# Number of the picture → its bytes. The ninth way is the end of the last shard, which is cut off in its picture;
# in the folder and the table that one is cut off itself. The tenth is that of vanish().
LAST = PICTURES - 1
SPOILED = {
    7: jpeg(7)[:-400],
    31: jpeg(31)[:-2],
    58: b"",
    90: b"<html>404</html>",
    121: flipped(jpeg(121)),
    150: png(150),  # named .jpg
    183: bomb(jpeg(183)),
    249: silent(png(249)),
    LAST: jpeg(LAST)[:500],
}
LEFT_OUT = {7, 31, 58, 90, 183, LAST}  # at first sight
GOOD = [n for n in range(PICTURES) if n not in LEFT_OUT]
# The picture that vanishes during a run comes up late in the first epoch; see vanish().
VANISHES = GOOD[next(row for row in Order(len(GOOD), BATCH, SEED).batch(16) if GOOD[row] not in SPOILED)]


def write(root: Path) -> dict[str, Path]:
    """Write the pictures as a folder, a TSV file and shards; return the sources."""
    rows, shards = [], {}
    for n in range(PICTURES):
        content, label = SPOILED[n] if n in SPOILED else picture(n), "abc"[n * 3 // PICTURES]
        _made(root / f"folder/{label}/{n:04}.jpg").write_bytes(content)
        rows.append(f"folder/{label}/{n:04}.jpg\t{label}\n")
        part = n * 3 // PICTURES
        if part not in shards:
            shards[part] = tarfile.open(_made(root / f"shards/{part}.tar"), "w")  # noqa: SIM115
        # The picture comes last, so that the end of the shard is within it.
        for suffix, data in (("cls", label.encode()), ("jpg", content)):
            about = tarfile.TarInfo(f"{n:04}.{suffix}")
            about.size = len(data)
            shards[part].addfile(about, io.BytesIO(data))
    for shard in shards.values():
        shard.close()
    last = root / f"shards/{max(shards)}.tar"
    start, size = _member(last, LAST)
    last.write_bytes(last.read_bytes()[: start + size - 100])
    (root / "table.tsv").write_text("filepath\tlabel\n" + "".join(rows))
    return {"folder": root / "folder", "table": root / "table.tsv", "shards": root / "shards"}


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _member(shard: Path, n: int) -> tuple[int, int]:
    """Return where the bytes of a picture lie in its shard."""
    with tarfile.open(shard) as tar:
        about = next(member for member in tar if member.name == f"{n:04}.jpg")
        return about.offset_data, about.size


def vanish(root: Path, copies: Path | None = None) -> None:
    """Let one picture vanish from all sources; in its shard, and in the copy of that, it becomes zeros."""
    part = VANISHES * 3 // PICTURES
    (root / f"folder/{'abc'[part]}/{VANISHES:04}.jpg").unlink(missing_ok=True)
    for shard in (root / f"shards/{part}.tar", *(copies.glob(f"*-{part}.tar") if copies else ())):
        start, size = _member(shard, VANISHES)
        with shard.open("r+b") as file:
            file.seek(start)
            file.write(bytes(size))
