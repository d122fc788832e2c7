"""Folders with a sub-folder per class."""

from __future__ import annotations

from tracer.data.folder import read_folder
from tracer.data.sample import Sample


def test_the_sub_folder_names_the_class_at_any_depth(tmp_path):
    for name in ("fox/b.png", "fox/deep/er/a.JPG", "red_owl/c.webp", "red_owl/notes.txt", "outside.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(read_folder(tmp_path)) == [
        Sample(str(tmp_path / "fox/b.png"), "fox", ()),
        Sample(str(tmp_path / "fox/deep/er/a.JPG"), "fox", ()),
        Sample(str(tmp_path / "red_owl/c.webp"), "red_owl", ()),
    ]
