"""Icon themes: the table of those in use, and the icons read from their Debian packages."""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from tracer.errors import UserError

# theme → Debian package, family; an icon in one ink belongs to the family LINE, whatever its theme
THEMES = {
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

# further themes, for pretraining alone
PRETRAINING_THEMES = {
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

# folders of a theme (the contexts of the freedesktop icon theme specification) → the word for captions
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

# pixels to prefer where a theme draws an icon in several sizes of one bucket, best first
SIZES = (16, 18, 12, 8, 32, 24, 22, 48, 64, 42, 1000, 96, 84, 128, 256)


@dataclass
class Icon:
    """One picture file of a theme: its names, its place in the theme, and its bytes."""

    theme: str
    name: str
    context: str
    bucket: str  # small, medium, large or symbolic
    pixels: int  # the size that it was drawn for; 1000 for a scalable one
    path: str
    data: bytes = field(repr=False)
    aliases: list[str] = field(default_factory=list)  # other names of the same file (links of the theme)

    @property
    def key(self) -> str:
        """The icon's identity, and its path among the benchmark's pictures."""
        return f"{self.theme}/{self.name}/{self.bucket}"


def read_theme(package: Path, theme: str) -> list[Icon]:
    """Return the icons of one theme in a Debian package, sorted by key, without unpacking it to disk.

    Each name gives one icon per bucket of sizes; links become aliases of the file that they lead to.

    Raises:
        UserError: the package is damaged.
    """
    root = f"usr/share/icons/{theme}/"
    best: dict[tuple[str, str], Icon] = {}
    links: dict[str, str] = {}
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    path = posixpath.normpath(member.name)
                    if not path.startswith(root):
                        continue
                    if member.issym():
                        links[path] = posixpath.normpath(
                            posixpath.join(posixpath.dirname(path), member.linkname)
                        )
                        continue
                    place = _place(path.removeprefix(root))
                    if place is None or not member.isfile():
                        continue
                    name, context, bucket, pixels = place
                    other = best.get((name, bucket))
                    if other is None or _rank(pixels, path) < _rank(other.pixels, other.path):
                        content = archive.extractfile(member)
                        assert content is not None
                        best[name, bucket] = Icon(theme, name, context, bucket, pixels, path, content.read())
        except tarfile.TarError:
            process.kill()
    if process.returncode:
        raise UserError(f"'{package}' is damaged or not a Debian package: remove it and start again")
    icons = {icon.path: icon for icon in best.values()}
    _add_aliases(icons, links, root)
    return sorted(icons.values(), key=lambda icon: icon.key)


def _add_aliases(icons: dict[str, Icon], links: dict[str, str], root: str) -> None:
    """Note at each icon (by path) the names of the links (path → target) that lead to it."""
    for path in sorted(links):
        place, target = _place(path.removeprefix(root)), icons.get(_resolve(path, links))
        if place is not None and target is not None and place[0] not in (target.name, *target.aliases):
            target.aliases.append(place[0])


def _place(path: str) -> tuple[str, str, str, int] | None:
    """Return the name, context, bucket and size that a path inside a theme stands for; None if it is left out."""
    *folders, file = path.split("/")
    name, extension = os.path.splitext(file)
    context = next((CONTEXTS[f] for f in folders if f in CONTEXTS), None)
    if extension not in (".png", ".svg") or context is None:
        return None
    if "animations" in folders or any("@" in f for f in folders):  # single frames; icons at double resolution
        return None
    pixels = next((int(m[0]) for f in folders if (m := re.match(r"\d+", f))), 1000)
    bucket = "small" if pixels <= 18 else "medium" if pixels < 42 else "large"
    if name.endswith("-symbolic") or "symbolic" in folders:
        bucket = "symbolic"
    return name.removesuffix("-symbolic"), context, bucket, pixels


def _rank(pixels: int, path: str) -> tuple[int, str]:
    return (SIZES.index(pixels) if pixels in SIZES else len(SIZES), path)


def _resolve(path: str, links: dict[str, str]) -> str:
    """Follow links of files and of folders, at most 8 in a row."""
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


def read_themes(files: dict[str, Path], themes: dict[str, tuple[str, str]], workers: int) -> list[Icon]:
    """Return the icons of several themes, sorted by key.

    Args:
        files: package → its file.
        themes: theme → package and family, as in :data:`THEMES`.
    """
    with ThreadPoolExecutor(workers) as pool:
        reading = pool.map(lambda theme: read_theme(files[themes[theme][0]], theme), themes)
        bar = tqdm(reading, total=len(themes), desc="reading icon themes", unit="theme")
        return sorted((icon for icons in bar for icon in icons), key=lambda icon: icon.key)
