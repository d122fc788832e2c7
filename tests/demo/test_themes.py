"""Reading themes from packages."""

from __future__ import annotations

import pytest

from tracer.demo import render, themes
from tracer.errors import UserError


def test_theme_gives_one_drawing_per_bucket_and_follows_links(theme_package):
    icons = {d.key: d for d in themes.read_theme(theme_package, "gnome")}
    assert list(icons) == [f"gnome/edit-cut/{b}" for b in ("large", "medium", "small", "symbolic")]
    assert [icons[k].pixels for k in icons] == [48, 24, 16, 1000]
    assert sorted(icons["gnome/edit-cut/large"].aliases) == ["gtk-cut", "scissors", "stock_cut"]
    assert icons["gnome/edit-cut/medium"].aliases == []
    assert render.render(icons["gnome/edit-cut/large"]) is not None


def test_damaged_package_is_named(tmp_path):
    (tmp_path / "broken.deb").write_bytes(b"!<arch>\nnot a package")
    with pytest.raises(UserError, match=r"broken\.deb' is damaged or not a Debian package"):
        themes.read_theme(tmp_path / "broken.deb", "gnome")
