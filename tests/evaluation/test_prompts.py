"""Prompts of the classes, and the files that are refused."""

from __future__ import annotations

import json

import pytest

from tracer.errors import UserError
from tracer.evaluation.prompts import class_prompts


def test_prompts_come_from_the_names_or_from_a_file(tmp_path):
    assert class_prompts(None, ["red_fox", "owl"]) == {
        "red_fox": ["a photo of a red fox"],
        "owl": ["a photo of a owl"],
    }
    written = {"b": ["one", "two"], "a": ["three"]}
    (tmp_path / "classes.json").write_text(json.dumps(written))
    read = class_prompts(tmp_path / "classes.json", ["a", "b", "c"])
    assert list(read.items()) == list(written.items())  # the file's, in its order


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist: check --classes"),
        ("{", "is not JSON"),
        ('["a"]', "must hold {class"),
        ('{"a": "one prompt", "b": ["two"]}', "must hold {class"),
        ('{"a": [], "b": ["two"]}', "at least one string"),
    ],
)
def test_bad_classes_files_are_named(tmp_path, content, says):
    path = tmp_path / "classes.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        class_prompts(path, ["a", "b"])
    assert "classes.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fewer_than_two_classes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"the data has 1 classes \('owl'\): a classifier needs at least two"):
        class_prompts(None, ["owl"])
    (tmp_path / "classes.json").write_text("{}")
    with pytest.raises(UserError, match=r"classes.json' has 0 classes \('none'\)"):
        class_prompts(tmp_path / "classes.json", ["a", "b"])
