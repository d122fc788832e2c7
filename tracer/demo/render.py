"""Icons as pixels: rendered, put on paper, and tested for a single ink."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from tracer.demo.themes import Icon

SIZE = 64  # pixels on a side of a stored picture


def render(icon: Icon) -> np.ndarray | None:
    """Return RGBA pixels [SIZE, SIZE, 4] uint8; None for an unreadable or an empty icon."""
    import resvg_py

    try:
        data = icon.data
        if icon.path.endswith(".svg"):
            text = data.decode("utf-8")
            data = bytes(
                resvg_py.svg_to_bytes(svg_string=text, width=SIZE, height=SIZE, skip_system_fonts=True)
            )
        image = Image.open(io.BytesIO(data)).convert("RGBA")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except (
        BaseException
    ):  # a panic of the SVG renderer (pyo3's PanicException) does not derive from Exception
        return None
    side = max(image.size)
    if image.size != (side, side):
        square = Image.new("RGBA", (side, side))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if side != SIZE:  # premultiplied (RGBa), or the colour of invisible pixels would bleed into the edges
        image = image.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGBA")
    pixels = np.asarray(image)
    return None if pixels[..., 3].mean() < 2 else pixels


def render_all(icons: Sequence[Icon], workers: int) -> tuple[list[Icon], np.ndarray]:
    """Return the icons that could be rendered, and their pixels [n, SIZE, SIZE, 4] uint8."""
    kept, pictures = [], []
    with ThreadPoolExecutor(workers) as pool:
        rendered = zip(icons, pool.map(render, icons), strict=True)
        for icon, pixels in tqdm(rendered, total=len(icons), desc="rendering icons", unit="icon"):
            if pixels is not None:
                kept.append(icon)
                pictures.append(pixels)
    return kept, np.stack(pictures) if pictures else np.empty((0, SIZE, SIZE, 4), np.uint8)


def in_chunks(function: Callable[[np.ndarray], np.ndarray], pictures: np.ndarray) -> np.ndarray:
    """Apply ``function`` to at most 1024 pictures at a time, so that its float copies stay small."""
    return np.concatenate([function(pictures[i : i + 1024]) for i in range(0, max(1, len(pictures)), 1024)])


def on_paper(pictures: np.ndarray) -> np.ndarray:
    """Return RGBA [n, S, S, 4] as RGB [n, S, S, 3]: on white, or on dark gray where white would hide the ink."""

    def flatten(chunk: np.ndarray) -> np.ndarray:
        p = chunk.astype(np.float32)
        colour, alpha = p[..., :3], p[..., 3:] / 255
        ink = (colour * alpha).sum((1, 2)).mean(-1) / alpha.sum((1, 2, 3)).clip(1e-6)
        dark = ((255 - colour) * alpha).max(-1) > 60
        pale = (ink > 200) & (dark.mean((1, 2)) < 0.02)
        paper = np.where(pale, 80.0, 255.0).astype(np.float32)[:, None, None, None]
        return (colour * alpha + paper * (1 - alpha) + 0.5).astype(np.uint8)

    return in_chunks(flatten, pictures)


def has_one_ink(pictures: np.ndarray) -> np.ndarray:
    """Return whether the opaque pixels of each RGBA picture share one colour, [n] bool.

    They do if the standard deviation of each channel lies below 12 of 255.
    """

    def measure(chunk: np.ndarray) -> np.ndarray:
        p = chunk.astype(np.float32)
        opaque = (p[..., 3:] > 200).astype(np.float32)
        count = opaque.sum((1, 2)).clip(1)
        mean = (p[..., :3] * opaque).sum((1, 2)) / count
        square = (((p[..., :3] - mean[:, None, None]) ** 2) * opaque).sum((1, 2)) / count
        return np.sqrt(square).max(-1) < 12

    return in_chunks(measure, pictures)
