"""Downloading packages: verified, kept, and refused with a remedy."""

from __future__ import annotations

import shutil

import pytest
from demo.icon_files import listed

from tracer.demo import packages
from tracer.errors import UserError


def test_download_verifies_repairs_and_keeps(theme_package, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "packages", lambda: listed(theme_package))
    mirrors = [f"copy:{tmp_path}/nowhere", f"copy:{theme_package.parent}"]  # the second one has it
    folder = tmp_path / "packages"
    files = packages.download(["one-theme"], folder, mirrors)
    assert files["one-theme"].read_bytes() == theme_package.read_bytes()
    files["one-theme"].write_bytes(b"cut off")
    packages.download(["one-theme"], folder, mirrors)
    assert files["one-theme"].read_bytes() == theme_package.read_bytes()
    packages.download(["one-theme"], folder, [])  # what is there is not fetched again
    assert [p.name for p in folder.iterdir()] == [theme_package.name]


@pytest.mark.parametrize("fault", [{"path": "missing_1_all.deb"}, {"sha256": "0" * 64}])
def test_download_that_fails_names_the_package_and_leaves_nothing(
    theme_package, tmp_path, monkeypatch, fault
):
    monkeypatch.setattr(packages, "packages", lambda: listed(theme_package, **fault))
    monkeypatch.setattr(packages, "_fetch_any_version", lambda *_: None)
    with pytest.raises(
        UserError, match=r"package one-theme 1 cannot be downloaded \(.+\): check the network"
    ):
        packages.download(["one-theme"], tmp_path / "packages", [f"copy:{theme_package.parent}"])
    assert list((tmp_path / "packages").iterdir()) == []


def test_download_without_apt_lists_what_to_fetch(theme_package, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "packages", lambda: listed(theme_package))
    monkeypatch.setattr(packages, "APT_HELPER", tmp_path / "no-such-helper")
    with pytest.raises(UserError, match=rf"apt is missing.*{theme_package.name}"):
        packages.download(["one-theme"], tmp_path)


def test_download_takes_another_version_where_the_archive_has_no_pinned_one(
    theme_package, tmp_path, monkeypatch
):
    """Ubuntu's case, with an archive of one package on this disk."""
    archive, folder = tmp_path / "archive", tmp_path / "packages"
    archive.mkdir()
    shutil.copy(theme_package, archive / "one-theme_1_all.deb")
    entry = listed(theme_package)["one-theme"]
    (archive / "Packages").write_text(
        "Package: one-theme\nVersion: 1\nArchitecture: all\nMaintainer: tests\nDescription: drawn\n"
        f"Filename: ./one-theme_1_all.deb\nSize: {entry['size']}\nSHA256: {entry['sha256']}\n"
    )
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] file:{archive} ./\n")
    sources = ("-o", f"Dir::Etc::sourcelist={tmp_path}/sources.list", "-o", "Dir::Etc::sourceparts=/dev/null")
    monkeypatch.setattr(packages, "APT", (*packages.APT, *sources))
    newer = listed(theme_package, version="2", path="one-theme_2_all.deb", sha256="0" * 64)
    monkeypatch.setattr(packages, "packages", lambda: newer)
    (file,) = packages.download(["one-theme"], folder, []).values()
    assert file.read_bytes() == theme_package.read_bytes()
    assert packages.describe("one-theme", file)["version"] == "1"
    assert packages.describe("one-theme", file)["pinned"] is False
    monkeypatch.setattr(packages, "_fetch_any_version", lambda *_: None)
    assert packages.download(["one-theme"], folder, []) == {"one-theme": file}  # kept
