"""Fixtures of the report's tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from report.samples import Page, sample_content

from tracer.report import page
from tracer.report.results import Results


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Page]:
    """Return a full report: the content of its results.json, its text, its parsed page."""
    folder = tmp_path_factory.mktemp("report")
    content = sample_content(folder)
    before = copy.deepcopy(content)
    path = page.write_report(Results.from_json(content), folder / "run" / "report.html")
    html = path.read_text(encoding="utf-8")
    assert content == before, "the results are only read"
    assert [p.name for p in (folder / "run").iterdir()] == ["report.html"], "no partial file stays"
    return content, html, Page(html)


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Any]:
    """Return results with two methods and no logs: quick to draw, for the cases that change one thing."""
    content = sample_content(tmp_path, steps=2)
    content["methods"] = [m for m in content["methods"] if m["key"] in ("zero-shot", "flyp")]
    for method in content["methods"]:
        for run in method["runs"]:
            run.update(log=[])
    content.update(curves=[], examples=[])
    return content
