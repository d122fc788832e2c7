"""The sentences claim what the numbers show, and nothing more."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from report.samples import Page, content_with

from tracer.report import page, sentences
from tracer.report.results import NBSP, Results

ZERO, PLAIN = ([0.4], [0.30]), ([0.55, 0.56], [0.25, 0.26])


def told(content: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Return the headline, and topic → sentences."""
    results = Results.from_json(content)
    topics = {topic: text.replace(NBSP, " ") for topic, text in sentences.findings(results)}
    return sentences.headline(results).replace(NBSP, " "), topics


@pytest.mark.parametrize(
    ("wma", "says"),
    [
        (([0.55, 0.56], [0.290, 0.292]), "WMA is the best fine-tuned model under shift: 29.1 ± 0.1 %"),
        (
            ([0.55, 0.56], [0.260, 0.261]),
            "No fine-tuned model is clearly ahead under shift: WMA scores highest with "
            "26.1 ± 0.1 %, and FLYP lies within the spread",
        ),
        (([0.55, 0.56], [0.201, 0.200]), "FLYP is the best fine-tuned model under shift: 25.5 ± 0.7 %"),
    ],
)
def test_headline_names_the_winner_only_if_clear(wma: Any, says: str) -> None:
    assert told(content_with(zero_shot=ZERO, flyp=PLAIN, wma=wma))[0].startswith(says)


@pytest.mark.parametrize(
    ("plain", "wma", "says"),
    [
        ([0.25, 0.26], [0.28, 0.28], "Of the 4.5 points that FLYP loses, WMA keeps 2.5."),
        ([0.25, 0.26], [0.31, 0.31], "Of the 4.5 points that FLYP loses, WMA keeps all and gains 1.0."),
        ([0.25, 0.26], [0.24, 0.24], "Of the 4.5 points that FLYP loses, WMA loses 1.5 more."),
        ([0.25, 0.26], [0.26, 0.27], "Of the 4.5 points that FLYP loses, WMA keeps 1.0 (within the spread)."),
        ([0.28, 0.31], [0.33, 0.33], "FLYP shows no clear loss. Compared with FLYP: WMA +3.5 points."),
        ([0.33, 0.33], [0.32, 0.32], "FLYP shows no clear loss. Compared with FLYP: WMA −1.0 points."),
    ],
)
def test_shift_sentence_follows_the_numbers(plain: list[float], wma: list[float], says: str) -> None:
    home = [0.55, 0.56]
    topics = told(content_with(zero_shot=ZERO, flyp=(home, plain), wma=(home, wma)))[1]
    assert topics["Under shift"].endswith(says)


def test_what_a_variant_changes_is_told() -> None:
    full, variant = ([0.50, 0.50], [0.30, 0.31]), ([0.52, 0.52], [0.301, 0.299])
    content = content_with(zero_shot=ZERO, flyp=PLAIN, r_adapter=full, other=variant)
    content["methods"][3]["variant_of"] = "r-adapter"
    topics = told(content)[1]
    assert topics["Parts of R-ADAPTER"] == "OTHER changes accuracy in distribution by +2.0 points."
    content["methods"][3]["runs"] = copy.deepcopy(content["methods"][2]["runs"])
    assert told(content)[1]["Parts of R-ADAPTER"] == "OTHER lies within the spread of the full method."
    for method in content["methods"]:
        del method["runs"][1:]  # one seed: nothing is clear, everything is told
    assert told(content)[1]["Parts of R-ADAPTER"] == (
        "OTHER changes accuracy in distribution by 0.0 points and under shift by 0.0 points."
    )
    assert "OTHER" not in topics["In distribution"] + topics["Under shift"] + topics["Calibration"]


def test_what_is_kept_is_told_in_numbers(written: tuple[dict[str, Any], str, Page]) -> None:
    content, _, shown = written
    assert dict(sentences.findings(Results.from_json(content)))["Size"] == (
        "R-Adapter trains 480,000 parameters, 10.0 % of FLYP's, and keeps 3.84 MB of optimizer state "
        "(FLYP 38.4 MB) and 1.92 MB of trained weights (FLYP 19.2 MB)."
    )
    kinds = ("parameters", "optimizer", "weights")
    assert [shown.cells[f"size/flyp/{kind}"] for kind in kinds] == ["4,800,000", "38.4", "19.2"]
    assert [shown.cells[f"size/r-adapter/{kind}"] for kind in kinds] == ["480,000", "3.84", "1.92"]
    assert "size/r-adapter-no-drop/weights" not in shown.cells
    assert "size/flyp/checkpoint" not in shown.cells, "not measured"
    measured = copy.deepcopy(content)
    for method, size in (("flyp", 57_600_000), ("r-adapter", 5_760_000)):
        runs = next(m for m in measured["methods"] if m["key"] == method)["runs"]
        runs[0]["sizes"] = runs[0]["sizes"] | {"checkpoint_bytes": size}
    text = dict(sentences.findings(Results.from_json(measured)))["Size"]
    assert ", 5.76 MB in a checkpoint (FLYP 57.6 MB) and" in text
    shown = Page(page.render(Results.from_json(measured), Path()))
    cells = [shown.cells[f"size/{key}/checkpoint"] for key in ("flyp", "r-adapter", "wma")]
    assert cells == ["57.6", "5.76", "–"]


@pytest.mark.parametrize(
    ("ema", "wma", "verdict"),
    [
        (lambda t: math.exp(-8 * t), lambda t: 1.0,
         "This agrees with the published claim that EMA's gap collapses and WMA's does not."),
        (lambda t: 1.0, lambda t: 1.0, "WMA's does not: EMA's gap does not collapse."),
        (lambda t: math.exp(-8 * t), lambda t: math.exp(-6 * t),
         "WMA's does not: WMA's gap collapses too."),
    ],
)  # fmt: skip
def test_gap_sentence_follows_the_logs(ema: Any, wma: Any, verdict: str) -> None:
    content = content_with(zero_shot=ZERO, flyp=PLAIN, ema=PLAIN, wma=PLAIN)
    for method, gap in zip(content["methods"][2:], (ema, wma), strict=True):
        for run in method["runs"]:
            run["log"] = [{"step": 1, "relational": 0.0}]  # teacher and student start equal
            run["log"] += [{"step": s, "relational": 0.02 * gap(s / 300)} for s in range(2, 301)]
    assert told(content)[1]["Teacher–student gap"].endswith(verdict)


def test_vanished_gap_counts_as_zero(tmp_path: Path) -> None:
    """Regression: dropping what a log axis cannot show took an earlier, larger gap for the last one."""
    content = content_with(zero_shot=ZERO, flyp=PLAIN, ema=PLAIN, wma=PLAIN)
    for method, last in zip(content["methods"][2:], (-1e-9, 0.01), strict=True):
        for run in method["runs"]:
            run["log"] = [{"step": s, "relational": 0.02 if s < 50 else last} for s in range(100)]
    gap = told(content)[1]["Teacher–student gap"]
    assert "EMA: the gap collapses; it peaks at 0.02 nats and ends at 0, 0 % of the peak." in gap
    assert "times EMA's" not in gap, "nothing is a multiple of 0"
    assert "Teacher–student KL" in page.render(Results.from_json(content), tmp_path)


def test_names_with_commas_are_divided_by_semicolons() -> None:
    assert sentences.listing(["A"]) == "A"
    assert sentences.listing(["A", "B", "C"]) == "A, B and C"
    assert sentences.listing(["TRACER, EMA", "B", "C"]) == "TRACER, EMA; B; and C"


def test_what_beats_what_is_told_by_the_paired_intervals(small: dict[str, Any]) -> None:
    """Regression: differences of the calibration error were in the results and not in the report."""

    def pair(one: str, column: str, measure: str, *values: float) -> dict[str, Any]:
        names = ("one", "other", "column", "measure", "value", "low", "high")
        return dict(zip(names, (one, "flyp", column, measure, *values), strict=True))

    pairs = [
        pair("ema", "in-distribution", "accuracy", 0.01, -0.01, 0.03),
        pair("ema", "shifted", "accuracy", 0.02, 0.01, 0.03),
        pair("ema", "shifted", "ece", 0.02, -0.01, 0.05),
        pair("wma", "in-distribution", "accuracy", 0.05, 0.04, 0.06),
        pair("wma", "shifted", "accuracy", -0.02, -0.03, -0.01),
        pair("wma", "shifted", "ece", -0.02, -0.03, -0.01),
        pair("wise-ft", "shifted", "accuracy", 0.0, -0.01, 0.01),
        pair("wise-ft", "shifted", "ece", 0.02, 0.01, 0.03),
    ]
    others = {"ema": "EMA teacher", "wma": "TRACER (WMA)", "wise-ft": "WiSE-FT"}
    methods = [*small["methods"], *({"key": key, "name": name} for key, name in others.items())]
    results = Results.from_json(small | {"pairs": pairs, "methods": methods})
    assert sentences.pair_sentences(results) == [
        (
            "Against FLYP, paired 95 % intervals",
            "Under shift, EMA teacher (+2.0 points, +1.0 to +3.0; not told apart in distribution) beats FLYP. "
            "Under shift, TRACER (WMA) (−2.0 points, −3.0 to −1.0; in distribution +5.0) falls below FLYP. "
            "Not to be told apart from FLYP under shift: WiSE-FT (0.0 points, −1.0 to +1.0). "
            "Under shift, TRACER (WMA) (−2.0 points, −3.0 to −1.0) is better calibrated than FLYP. "
            "Under shift, WiSE-FT (+2.0 points, +1.0 to +3.0) is worse calibrated than FLYP.",
        )
    ]
