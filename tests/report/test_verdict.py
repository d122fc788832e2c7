"""Did it help, and how sure is that: gains, their intervals, and what is never marked."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tracer.data.build import collect
from tracer.data.sample import Sample
from tracer.evaluation.metrics import Predictions
from tracer.evaluation.scores import add_gains, score_classes
from tracer.evaluation.sets import EvaluationSet
from tracer.report.results import Results
from tracer.report.tables import table_rows
from tracer.report.verdict import verdicts


def score(accuracy: float, pictures: int, **more: float) -> dict:
    return {"accuracy": accuracy, "ece": 0.1, "pictures": pictures, **more}


def scored(right: list[bool], classes: int = 10) -> dict:
    """Scores of a set in which a model classifies these pictures rightly; its classes take turns."""
    truth = np.arange(len(right), dtype=np.int32) % classes
    predicted = np.where(right, truth, (truth + 1) % classes).astype(np.int32)
    kept = Predictions(
        truth, predicted, (predicted != truth).astype(np.int32), *np.full((2, len(right)), 0.5)
    )
    rows = [Sample(f"{n}.png", str(c), ()) for n, c in enumerate(truth)]
    prompts = {str(c): [str(c)] for c in range(classes)}
    return {"a": score_classes(EvaluationSet(collect("a", rows), prompts=prompts), kept)}


def test_a_gain_is_that_of_the_same_pictures():
    before, after = scored([True] * 50 + [False] * 50), scored([False] * 5 + [True] * 60 + [False] * 35)
    add_gains(after, before)
    got = after["a"].score
    assert got["accuracy_gain"] == pytest.approx(0.1)
    # About the paired standard error over pictures, of 5 lost and 15 won, on either side.
    error = 1.96 * math.sqrt((0.2 - 0.1**2) / 100)
    assert got["accuracy_gain_low"] == pytest.approx(0.1 - error, abs=0.02)
    assert got["accuracy_gain_high"] == pytest.approx(0.1 + error, abs=0.02)


def test_one_picture_of_each_class_is_no_sure_fall():
    """With two classes, draws of classes alone would find the loss of one picture in each a sure one."""
    before, after = scored([True] * 200, 2), scored([False] * 2 + [True] * 198, 2)
    add_gains(after, before)
    assert after["a"].score["accuracy_gain_high"] == 0
    assert verdicts({"student": {"a": after["a"].score}})[0].startswith(
        "a: no sure change of the student; −1.0 points"
    )


@pytest.mark.parametrize(
    ("gain", "low", "high", "says"),
    [
        (0.1, 0.08, 0.12, "a: fine-tuning helped the student by 10.0 points (95 %: +8.0 to +12.0)"),
        (-0.1, -0.12, -0.08, "a: fine-tuning hurt the student by 10.0 points (95 %: −12.0 to −8.0)"),
        (
            0.01,
            -0.01,
            0.03,
            "a: no sure change of the student; +1.0 points on 100 pictures could be chance (95 %: −1.0 to +3.0)",
        ),
        (0.0, 0.0, 0.0, "a: no change of the student on 100 pictures"),
        (0.0, -0.02, 0.02, "a: no sure change of the student; 0.0 points"),
    ],
)
def test_the_verdict_says_how_sure_a_change_is(gain, low, high, says):
    bounds = {"accuracy_gain": gain, "accuracy_gain_low": low, "accuracy_gain_high": high}
    (line,) = verdicts({"student": {"a": score(0.5, 100, **bounds)}})
    assert line.startswith(says)


@pytest.mark.parametrize(("groups", "size"), [(3, "36 pictures in 3 groups"), (36, "36 pictures")])
def test_the_verdict_says_what_was_drawn(groups, size):
    """Regression: +36 points on 36 pictures "could be chance", without a word of their three classes."""
    known = {"accuracy_gain": 0.36, "accuracy_gain_low": 0.0, "accuracy_gain_high": 0.66, "groups": groups}
    (line,) = verdicts({"student": {"a": score(0.5, 36, **known)}})
    assert f"+36.0 points on {size} could be chance" in line


def test_a_set_is_judged_by_the_measure_of_its_publication():
    gains = {"accuracy_gain": 0.1, "accuracy_gain_low": 0.05, "accuracy_gain_high": 0.15}
    gains |= {"macro_f1_gain": -0.1, "macro_f1_gain_low": -0.15, "macro_f1_gain_high": -0.05}
    (line,) = verdicts({"student": {"a": score(0.5, 100, **gains) | {"measure": "macro_f1"}}})
    assert line.startswith("a (macro-F1): fine-tuning hurt")


def results(pictures: int, lost: int, paired: bool) -> Results:
    """Three seeds that all lose the same pictures against the start, so that the seeds have no spread."""
    gain, after = -lost / pictures, 0.5 - lost / pictures
    error = 1.96 * math.sqrt(lost / pictures - gain**2) / pictures**0.5
    bounds = {"accuracy_gain": gain, "accuracy_gain_low": gain - error, "accuracy_gain_high": gain + error}
    now = score(after, pictures, **(bounds if paired else {}))
    methods = [
        {
            "key": "zero-shot",
            "name": "Zero-shot",
            "runs": [{"seed": None, "eval": {"a": score(0.5, pictures)}}],
        },
        {"key": "flyp", "name": "FLYP", "runs": [{"seed": n, "eval": {"a": now}} for n in range(3)]},
    ]
    domains = [{"name": "a", "kind": "shifted", "pictures": pictures, "classes": 2, "chance": 0.5}]
    return Results.from_json({"domains": domains, "methods": methods})


@pytest.mark.parametrize(
    ("pictures", "lost", "paired", "trend"),
    [
        (30, 1, True, ""),  # one picture is never a fall, however alike the seeds are
        (30, 1, False, ""),
        (30, 3, True, ""),
        (30, 6, True, "down"),
        (1000, 1, True, ""),
        (1000, 60, False, "down"),
    ],
)
def test_the_choice_of_pictures_counts_beside_the_seeds(pictures, lost, paired, trend):
    row = table_rows(results(pictures, lost, paired), "accuracy")[-1]
    assert row.cells[0].trend == trend


def notices(key: str) -> list[str]:
    return ["'a' is small", f"{key} rests"]


def test_notices_of_runs_stand_in_the_report_once():
    content = {
        "domains": [{"name": "a"}],
        "methods": [
            {
                "key": k,
                "name": k.upper(),
                "runs": [{"seed": s, "notices": ["'a' is small", f"{k} rests"]} for s in (0, 1)],
            }
            for k in ("x", "y")
        ],
        "notices": ["other starts"],
    }
    assert Results.from_json(content).cautions == ["other starts", "'a' is small", "X: x rests", "Y: y rests"]
