"""Classes and captions of icons."""

from __future__ import annotations

import pytest
from demo.icon_files import icon

from tracer.demo import benchmark, captions, packages, themes
from tracer.errors import UserError


def test_shipped_classes_and_packages_are_consistent():
    classes, phrases = captions.read_classes()
    assert len(phrases) > 250
    assert set(classes.values()) == set(phrases)
    assert all(classes[label] == label and texts and all(texts) for label, texts in phrases.items())
    known = packages.packages()
    assert {package for package, _ in (themes.THEMES | themes.PRETRAINING_THEMES).values()} == set(known)
    assert all(len(p["sha256"]) == 64 and p["licence"] and p["size"] > 0 for p in known.values())
    assert set(benchmark.FAMILY_ROLES) == {family for _, family in themes.THEMES.values()} | {themes.LINE}


def test_a_name_in_two_classes_is_refused(tmp_path):
    (tmp_path / "classes.txt").write_text("a = a x ; one\nb = b x ; two\n")
    with pytest.raises(UserError, match="'x' belongs to both 'a' and 'b'"):
        captions.read_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize(
    ("name", "aliases", "label"),
    [
        ("edit-cut", ["go-up"], "edit-cut"),  # its own name decides
        ("scissors", ["edit-cut", "other"], "edit-cut"),  # else its links
        ("generic", ["edit-cut", "go-up"], ""),  # unless they disagree
        ("unheard-of", [], ""),
    ],
)
def test_class_of_a_drawing(name, aliases, label):
    classes, _ = captions.read_classes()
    assert captions.class_of(icon(name, aliases=aliases), classes) == label


def test_captions_hold_phrases_name_context_and_known_links():
    d = icon("gtk-cut", aliases=["edit-cut", "stock_cut", "not-drawn-elsewhere"])
    texts = captions.captions(d, "edit-cut", ["cut", "scissors"], {"edit-cut", "stock_cut"})
    assert set(texts) == {"cut", "scissors", "edit cut", "cut action", "scissors action"}
    assert texts.count("scissors") == 2  # a repeated caption is a likelier one
    assert "not drawn elsewhere" not in texts
    assert captions.captions(icon("my-app.v2"), "", (), set()) == ["my app v2"] * 2 + ["my app v2 action"]
