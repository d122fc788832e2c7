"""Prompts of the classes, and the files that are refused."""

from __future__ import annotations

import json

import open_clip
import pytest

from tracer.data.build import collect
from tracer.data.sample import Sample
from tracer.errors import UserError
from tracer.evaluation.prompts import check_distinct, check_labels, class_prompts


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
        ('{"a": [" "], "b": ["two"]}', "none empty"),
        ('{"a": ["one"], "b": ["two"], "a": ["three"]}', "names 'a' twice"),
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


CONTEXT = open_clip.SimpleTokenizer(context_length=8)


@pytest.mark.parametrize(
    "prompts",
    [
        class_prompts(None, ["hot_dog", "hot-dog"]),
        class_prompts(None, ["hot dog", "cat", "Hot  Dog "]),
        {"a": ["one", "two"], "b": ["two", "one"]},
        {"a": ["one"], "b": ["one", "one"]},
        {"a": ["one two three four five six seven"], "b": ["one two three four five six eight"]},  # beyond
    ],
)
def test_classes_with_the_same_prompts_are_named(prompts):
    first, *_, last = prompts
    with pytest.raises(
        UserError, match=f"'{first}' and '{last}' have the same prompts, such as .*never win: join"
    ):
        check_distinct(prompts, CONTEXT)


def test_classes_that_share_a_prompt_are_distinct():
    check_distinct({"a": ["one", "two"], "b": ["two"], "c": ["one", "one", "two"]}, CONTEXT)


@pytest.mark.parametrize(("missing", "says"), [([0, 1, 2], "no labels"), ([1], "1 picture without a label")])
def test_pictures_without_a_label_are_refused(missing, says):
    labels = [None if n in missing else "cat" for n in range(3)]
    index = collect("mixed", (Sample(f"{n}.png", label, ("a cat",)) for n, label in enumerate(labels)))
    with pytest.raises(
        UserError, match=rf"'mixed' has {says}, first '{missing[0]}.png': .*one for retrieval"
    ):
        check_labels([index], {"cat": ["a cat"], "dog": ["a dog"]})


def test_fewer_than_two_classes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"the data has one class \('owl'\): a classifier needs at least two"):
        class_prompts(None, ["owl"])
    (tmp_path / "classes.json").write_text("{}")
    with pytest.raises(UserError, match=r"classes.json' names no class"):
        class_prompts(tmp_path / "classes.json", ["a", "b"])
