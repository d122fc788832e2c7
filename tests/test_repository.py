"""What no other test runs: every benchmark can be imported, and no page still has a gap to fill in."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks.page import BEGIN, END

ROOT = Path(__file__).parent.parent
BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
PAGES = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_can_be_imported(name):
    assert importlib.import_module(f"benchmarks.{name}").__doc__


@pytest.mark.parametrize("page", PAGES)
def test_pages_hold_no_placeholder(page):
    lines = [x for x in (ROOT / page).read_text().splitlines() if x not in (BEGIN, END)]
    gaps = [n for n, line in enumerate(lines, 1) if "<!--" in line]
    assert not gaps, f"{page}: a comment where a number or text belongs, lines {gaps}"
