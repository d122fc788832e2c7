"""Icons, themes and packages that the tests of the demo draw and build themselves (no download)."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tracer.demo.themes import Icon

CLASSES = ("edit-cut", "edit-copy", "go-up", "go-down", "printer", "scanner", "starred", "face-sad")


def drawn(seed: int, colour: str = "#c03040") -> Image.Image:
    """A 48-pixel drawing of its own for each seed."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGBA", (48, 48))
    for shade in (colour, "#203060"):
        ImageDraw.Draw(picture).polygon([tuple(p) for p in rng.integers(2, 46, (4, 2)).tolist()], fill=shade)
    return picture


def icon(name: str, data: bytes = b"", theme: str = "gnome", path: str = "a.png", **more) -> Icon:
    """Return an icon of a large size in the context of actions."""
    return Icon(theme, name, "action", "large", 48, path, data, **more)


def build_package(folder: Path, name: str, draw: Callable[[Path], None]) -> Path:
    """A Debian package whose icon folder ``draw(usr/share/icons)`` fills."""
    root = folder / f"{name}-root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    )
    themes = root / "usr/share/icons"
    themes.mkdir(parents=True)
    draw(themes)
    package = folder / f"{name}_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", root, package], check=True, capture_output=True)
    return package


def svg(body: str, size: int = 16) -> bytes:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}">'
    return f"{head}{body}</svg>".encode()


def listed(package: Path, **changes) -> dict[str, dict]:
    entry = {
        "package": "one-theme",
        "version": "1",
        "path": package.name,
        "size": package.stat().st_size,
        "sha256": hashlib.sha256(package.read_bytes()).hexdigest(),
        "licence": "drawn by the tests",
    }
    return {"one-theme": entry | changes}
