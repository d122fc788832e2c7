"""Packages of icon themes, built for the tests of the demo."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from demo.icon_files import CLASSES, build_package, drawn, listed, svg

from tracer.demo import packages, themes


@pytest.fixture(scope="module")
def theme_package(tmp_path_factory) -> Path:
    def draw(themes: Path) -> None:
        theme = themes / "gnome"
        for size in (16, 22, 24, 48, 256):
            (theme / f"{size}x{size}/actions").mkdir(parents=True)
            drawn(size).save(theme / f"{size}x{size}/actions/edit-cut.png")
        large = theme / "48x48/actions"
        (large / "gtk-cut.png").symlink_to("edit-cut.png")
        (large / "stock_cut.png").symlink_to("gtk-cut.png")  # a link to a link
        (theme / "scalable").symlink_to("48x48")  # a link of a folder
        (large / "scissors.png").symlink_to("../../scalable/actions/edit-cut.png")
        for folder in ("48x48@2x/actions", "48x48/animations", "48x48/elsewhere", "symbolic/actions"):
            (theme / folder).mkdir(parents=True)
        drawn(1).save(theme / "48x48@2x/actions/edit-cut.png")
        drawn(2).save(theme / "48x48/animations/spinner.png")
        drawn(3).save(theme / "48x48/elsewhere/lost.png")
        (theme / "symbolic/actions/edit-cut-symbolic.svg").write_bytes(svg('<rect width="8" height="8"/>'))
        (theme / "index.theme").write_text("[Icon Theme]\n")
        (themes / "other/48x48/actions").mkdir(parents=True)
        drawn(4).save(themes / "other/48x48/actions/edit-copy.png")

    return build_package(tmp_path_factory.mktemp("package"), "one-theme", draw)


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """Six themes that draw eight classes; Tango copies gnome's scissors in other colours."""
    used = {
        "gnome": ("p-gnome", "shaded"),
        "Tango": ("p-tango", "shaded"),
        "Adwaita": ("p-adwaita", "smooth"),
        "Faenza": ("p-faenza", "square"),
        "Papirus": ("p-papirus", "flat"),
    }
    more = {"oxygen": ("p-oxygen", "shaded")}
    known: dict[str, dict] = {}
    folder = tmp_path / "data/packages"
    folder.mkdir(parents=True)
    for t, (theme, (name, _)) in enumerate((used | more).items()):

        def draw(folder: Path, theme=theme, t=t) -> None:
            actions = folder / theme / "48x48/actions"
            actions.mkdir(parents=True)
            for c, label in enumerate((*CLASSES, "my-app")):
                copy = label == "edit-cut" and theme in ("gnome", "Tango")
                drawn(0 if copy else 100 * t + c + 1, f"#c0{t * 20 + 10:02x}40").save(
                    actions / f"{label}.png"
                )
                ink = f'<path d="M{t} 1h{c + 2}v{t + 2}z"/><rect x="{c}" y="9" width="{t + 1}" height="5"/>'
                (actions / f"{label}-symbolic.svg").write_bytes(svg(ink))

        package = build_package(tmp_path, name, draw)
        shutil.move(package, folder)
        known |= {name: listed(folder / package.name)["one-theme"] | {"package": name}}
    for table, entries in ((themes.THEMES, used), (themes.PRETRAINING_THEMES, more)):
        for theme in list(table):
            monkeypatch.delitem(table, theme)
        for theme, entry in entries.items():
            monkeypatch.setitem(table, theme, entry)
    monkeypatch.setattr(packages, "packages", lambda: known)
    return tmp_path / "data"
