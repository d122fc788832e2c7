"""Did it help, and how sure is that: gains, their intervals, and what is never marked."""

from __future__ import annotations

import math

import pytest
import torch

from tracer.evaluation.zero_shot import add_gains
from tracer.report.results import Results
from tracer.report.tables import table_rows
from tracer.report.verdict import gain_with_interval, verdicts


def score(accuracy: float, pictures: int, **more: float) -> dict:
    return {"accuracy": accuracy, "ece": 0.1, "pictures": pictures, **more}


def test_a_gain_has_the_error_of_paired_differences():
    before = torch.tensor([True] * 50 + [False] * 50)
    after = torch.tensor([False] * 5 + [True] * 60 + [False] * 35)  # 5 lost, 15 won
    scores = {"a": score(0.6, 100)}
    add_gains(scores, {"a": after}, {"a": before})  # type: ignore[arg-type]
    assert scores["a"]["gain"] == pytest.approx(0.1)
    assert scores["a"]["gain_error"] == pytest.approx(math.sqrt((0.2 - 0.1**2) / 100))
    assert gain_with_interval(scores["a"]) == "+10.0 (+1.5 to +18.5)"


@pytest.mark.parametrize(
    ("gain", "error", "says"),
    [
        (0.1, 0.01, "a: fine-tuning helped, by 10.0 ± 2.0 points"),
        (-0.1, 0.01, "a: fine-tuning hurt, by 10.0 ± 2.0 points"),
        (0.01, 0.01, "a: no sure change; +1.0 points on 100 pictures could be chance (±2.0)"),
        (0.0, 0.0, "a: no change; every picture is classified as before"),
        (0.0, 0.01, "a: no sure change; 0.0 points"),
    ],
)
def test_the_verdict_says_how_sure_a_change_is(gain, error, says):
    (line,) = verdicts({"student": {"a": score(0.5, 100, gain=gain, gain_error=error)}})
    assert line.startswith(says)


def results(pictures: int, lost: int, paired: bool) -> Results:
    """Three seeds that all lose the same pictures against the start, so that the seeds have no spread."""
    gain, after = -lost / pictures, 0.5 - lost / pictures
    error = math.sqrt(lost / pictures - gain**2) / pictures**0.5
    now = score(after, pictures, **({"gain": gain, "gain_error": error} if paired else {}))
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
