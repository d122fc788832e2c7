"""The figures of what was logged."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from report.samples import Page

from tracer.report import page
from tracer.report.figures import BOTH_MODELS
from tracer.report.results import Results


def test_gap_within_a_decade_has_its_axis_labelled(small: dict[str, Any], tmp_path: Path) -> None:
    """Regression: a log axis without a whole decade in view came out without a single number."""
    small["methods"][1]["runs"][0]["log"] = [
        {"step": s, "relational": 0.03 + 0.01 * math.sin(s)} for s in range(9)
    ]
    drawn = page.render(Results.from_json(small), tmp_path)
    (gap,) = re.findall(r'<svg[^>]*aria-label="Teacher–student KL.*?</svg>', drawn, flags=re.DOTALL)
    assert ">0.02<" in gap


def test_diagnostics_show_student_against_teacher(written: tuple[dict[str, Any], str, Page]) -> None:
    _, text, _ = written
    drawn = dict(re.findall(r'<svg[^>]*aria-label="([^"]*)"(.*?)</svg>', text, flags=re.DOTALL))
    logged = "FLYP, EMA teacher, TRACER (WMA) and R-Adapter"
    for title in BOTH_MODELS.values():
        figure = drawn[f"{title} over the steps: {logged}"]
        assert ">its teacher<" in figure
        assert all(figure.count(f">{name}<") == 1 for name in ("FLYP", "EMA teacher"))
    assert "Agreement: share of equal predictions over the steps: EMA teacher and TRACER (WMA)" in drawn
    assert not [label for label in drawn if "/" in label], "no direction has a figure of its own"


def test_diagnostics_are_left_out_where_nothing_was_measured(small: dict[str, Any], tmp_path: Path) -> None:
    small["methods"][1]["runs"][0]["log"] = [{"step": s, "loss": 1.0 / s} for s in (1, 2)]
    text = page.render(Results.from_json(small), tmp_path)
    assert "Predictions of student and teacher" not in text
    small["methods"][1]["runs"][0]["log"][1] |= {
        f"student/{direction}/entropy": 0.5 for direction in ("image_to_text", "text_to_image")
    }
    text = page.render(Results.from_json(small), tmp_path)
    assert "Predictions of student and teacher" in text
    assert "its teacher" not in text
