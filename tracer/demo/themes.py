"""Drawings of icon themes: what each is called, and its pixels."""

from __future__ import annotations

import io
import os
import posixpath
import re
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tracer.demo.packages import ASSETS
from tracer.errors import UserError

SIZE = 64  # pixels of a stored picture

# hand (theme) → Debian package, family; one-ink drawings belong to the family LINE, whoever drew them
HANDS = {
    "gnome": ("gnome-icon-theme", "shaded"),
    "mate": ("mate-icon-theme", "shaded"),
    "Tango": ("tango-icon-theme", "shaded"),
    "gnome-colors-common": ("gnome-colors-common", "shaded"),
    "nuoveXT2": ("lxde-icon-theme", "shaded"),
    "elementary-xfce": ("elementary-xfce-icon-theme", "shaded"),
    "elementary": ("elementary-icon-theme", "smooth"),
    "Adwaita": ("adwaita-icon-theme", "smooth"),
    "Faenza": ("faenza-icon-theme", "square"),
    "Papirus": ("papirus-icon-theme", "flat"),
    "Numix": ("numix-icon-theme", "flat"),
    "breeze": ("breeze-icon-theme", "flat"),
    "suru": ("suru-icon-theme", "flat"),
    "Faba": ("faba-icon-theme", "flat"),
}

# further hands, seen in pretraining only
MORE_HANDS = {
    "oxygen": ("oxygen-icon-theme", "shaded"),
    "Obsidian": ("obsidian-icon-theme", "square"),
    "Nuovo": ("gnome-icon-theme-nuovo", "shaded"),
    "gartoon": ("gnome-icon-theme-gartoon", "shaded"),
    "yasis": ("gnome-icon-theme-yasis", "shaded"),
    "bloom": ("deepin-icon-theme", "flat"),
    "Vintage": ("deepin-icon-theme", "flat"),
    "Paper": ("paper-icon-theme", "flat"),
}

LINE = "line"

TRAIN_FAMILY = "shaded"

# folders of a theme (the specification's contexts) → the word for captions
CONTEXTS = {
    "actions": "action",
    "apps": "application",
    "categories": "category",
    "devices": "device",
    "emblems": "emblem",
    "emotes": "emote",
    "mimetypes": "file type",
    "mimes": "file type",
    "places": "place",
    "status": "status",
    "panel": "status",
    "preferences": "preferences",
    "legacy": "",
}

# the size to take where a hand drew several of the same bucket, best first
SIZES = (16, 18, 12, 8, 32, 24, 22, 48, 64, 42, 1000, 96, 84, 128, 256)


@dataclass
class Drawing:
    """One picture file of one hand: what it is called, where it lay in the theme, and its bytes."""

    hand: str
    name: str
    context: str
    bucket: str  # small, medium, large or symbolic
    pixels: int  # the size that it was drawn for; 1000 for any
    path: str
    data: bytes = field(repr=False)
    aliases: list[str] = field(default_factory=list)  # other names of the same file (links of the theme)

    @property
    def key(self) -> str:
        return f"{self.hand}/{self.name}/{self.bucket}"


def read_classes(path: Path = ASSETS / "classes.txt") -> tuple[dict[str, str], dict[str, list[str]]]:
    """``(name of a drawing → class, class → phrases)`` from lines ``class = names ; phrases``."""
    classes: dict[str, str] = {}
    phrases: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        label, rest = line.split(" = ")
        names, texts = rest.split(" ; ")
        phrases[label] = [text.strip() for text in texts.split(",")]
        for name in names.split():
            if name in classes:
                raise ValueError(f"{path}: '{name}' belongs to both '{classes[name]}' and '{label}'")
            classes[name] = label
    return classes, phrases


def class_of(drawing: Drawing, classes: dict[str, str]) -> str:
    """The class of a drawing by its own name, else by its links when they agree; '' for none."""
    if drawing.name in classes:
        return classes[drawing.name]
    found = {classes[alias] for alias in drawing.aliases if alias in classes}
    return found.pop() if len(found) == 1 else ""


def words(name: str) -> str:
    """An icon's name as words: 'gtk-go-back' → 'go back'."""
    name = re.sub(r"^(gtk|gnome-dev|gnome-fs|gnome-mime|gnome|stock|xfce|kde)[-_]", "", name)
    return re.sub(r"[-_.+ ]+", " ", name).strip()


def captions(drawing: Drawing, label: str, phrases: Sequence[str], known: set[str]) -> list[str]:
    """What the drawing may be called; a repeated caption is a likelier one. ``known`` names give synonyms."""
    own, context = words(drawing.name), drawing.context
    texts = [*phrases, *phrases, words(label)] if label else [own]
    texts.append(own)
    if context:
        texts += [f"{text} {context}" for text in ([own, *phrases] if label else [own])]
    texts += [words(alias) for alias in drawing.aliases if alias in known][:3]
    return [text for text in texts if text]


def read_theme(package: Path, hand: str) -> list[Drawing]:
    """The drawings of one theme in a Debian package, without unpacking it to disk.

    Of each name one drawing per bucket of sizes; links become aliases of the file that they lead to.
    """
    theme = f"usr/share/icons/{hand}/"
    best: dict[tuple[str, str], Drawing] = {}
    links: dict[str, str] = {}
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    path = posixpath.normpath(member.name)
                    if not path.startswith(theme):
                        continue
                    if member.issym():
                        here = posixpath.dirname(path)
                        links[path] = posixpath.normpath(posixpath.join(here, member.linkname))
                        continue
                    place = _place(path.removeprefix(theme))
                    if place is None or not member.isfile():
                        continue
                    name, context, bucket, pixels = place
                    old = best.get((name, bucket))
                    if old is None or _rank(pixels, path) < _rank(old.pixels, old.path):
                        content = archive.extractfile(member)
                        assert content is not None
                        drawing = Drawing(hand, name, context, bucket, pixels, path, content.read())
                        best[name, bucket] = drawing
        except tarfile.TarError:
            process.kill()
    if process.returncode:
        raise UserError(f"'{package}' is no readable Debian package: remove it and start again")
    drawings = {drawing.path: drawing for drawing in best.values()}
    for path in sorted(links):
        place = _place(path.removeprefix(theme))
        target = drawings.get(_resolve(path, links))
        if place is not None and target is not None and place[0] not in (target.name, *target.aliases):
            target.aliases.append(place[0])
    return sorted(drawings.values(), key=lambda d: d.key)


def _place(path: str) -> tuple[str, str, str, int] | None:
    """Name, context, bucket and size that a path inside a theme stands for; None if it is no icon of ours."""
    *folders, file = path.split("/")
    name, extension = os.path.splitext(file)
    context = next((CONTEXTS[f] for f in folders if f in CONTEXTS), None)
    if extension not in (".png", ".svg") or context is None:
        return None
    if "animations" in folders or any("@" in f for f in folders):  # frames; the same at twice the pixels
        return None
    pixels = next((int(m[0]) for f in folders if (m := re.match(r"\d+", f))), 1000)
    bucket = "small" if pixels <= 18 else "medium" if pixels < 42 else "large"
    if name.endswith("-symbolic") or "symbolic" in folders:
        bucket = "symbolic"
    return name.removesuffix("-symbolic"), context, bucket, pixels


def _rank(pixels: int, path: str) -> tuple[int, str]:
    return (SIZES.index(pixels) if pixels in SIZES else len(SIZES), path)


def _resolve(path: str, links: dict[str, str]) -> str:
    """Follow links of files and of folders, at most a few deep."""
    for _ in range(8):
        parts = path.split("/")
        for n in range(len(parts), 0, -1):
            head = "/".join(parts[:n])
            if head in links:
                path = posixpath.normpath(posixpath.join(links[head], *parts[n:]))
                break
        else:
            break
    return path


def read_themes(files: dict[str, Path], hands: dict[str, tuple[str, str]], workers: int) -> list[Drawing]:
    """The drawings of several hands, sorted by key."""
    jobs = list(hands.items())
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda job: read_theme(files[job[1][0]], job[0]), jobs)
        bar = tqdm(found, total=len(jobs), desc="reading icon themes", unit="theme")
        return sorted((d for drawings in bar for d in drawings), key=lambda d: d.key)


def render(drawing: Drawing) -> np.ndarray | None:
    """RGBA pixels [SIZE, SIZE, 4] uint8; None for an unreadable or an empty drawing."""
    import resvg_py

    try:
        data = drawing.data
        if drawing.path.endswith(".svg"):
            text = data.decode("utf-8")
            data = bytes(
                resvg_py.svg_to_bytes(svg_string=text, width=SIZE, height=SIZE, skip_system_fonts=True)
            )
        image = Image.open(io.BytesIO(data)).convert("RGBA")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:  # a panic of the SVG renderer (pyo3's PanicException) is no Exception
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


def render_all(drawings: Sequence[Drawing], workers: int) -> tuple[list[Drawing], np.ndarray]:
    """The drawings that could be rendered and their pixels [n, SIZE, SIZE, 4]."""
    kept, pictures = [], []
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(render, drawings)
        for drawing, pixels in tqdm(
            zip(drawings, results, strict=True), total=len(drawings), desc="rendering icons", unit="icon"
        ):
            if pixels is not None:
                kept.append(drawing)
                pictures.append(pixels)
    return kept, np.stack(pictures) if pictures else np.empty((0, SIZE, SIZE, 4), np.uint8)


def in_chunks(function: Callable[[np.ndarray], np.ndarray], pictures: np.ndarray) -> np.ndarray:
    """``function`` over at most 1024 pictures at a time: the float copies stay small."""
    return np.concatenate([function(pictures[i : i + 1024]) for i in range(0, max(1, len(pictures)), 1024)])


def on_paper(pictures: np.ndarray) -> np.ndarray:
    """RGBA [n, S, S, 4] → RGB [n, S, S, 3]: on white, or on dark gray where white would swallow the ink."""

    def flatten(chunk: np.ndarray) -> np.ndarray:
        p = chunk.astype(np.float32)
        colour, alpha = p[..., :3], p[..., 3:] / 255
        ink = (colour * alpha).sum((1, 2)).mean(-1) / alpha.sum((1, 2, 3)).clip(1e-6)
        dark = ((255 - colour) * alpha).max(-1) > 60
        pale = (ink > 200) & (dark.mean((1, 2)) < 0.02)
        paper = np.where(pale, 80.0, 255.0).astype(np.float32)[:, None, None, None]
        return (colour * alpha + paper * (1 - alpha) + 0.5).astype(np.uint8)

    return in_chunks(flatten, pictures)


def one_ink(pictures: np.ndarray) -> np.ndarray:
    """Whether the opaque pixels of each RGBA picture have one colour (spread below 12 of 255), [n] bool."""

    def measure(chunk: np.ndarray) -> np.ndarray:
        p = chunk.astype(np.float32)
        opaque = (p[..., 3:] > 200).astype(np.float32)
        count = opaque.sum((1, 2)).clip(1)
        mean = (p[..., :3] * opaque).sum((1, 2)) / count
        square = (((p[..., :3] - mean[:, None, None]) ** 2) * opaque).sum((1, 2)) / count
        return np.sqrt(square).max(-1) < 12

    return in_chunks(measure, pictures)
