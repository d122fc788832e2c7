"""What no other test runs: every benchmark can be imported, and the pages name existing files and have no gap."""

from __future__ import annotations

import importlib
import re

import pytest
from source_rules import ROOT, module_of, pages, python_files

BENCHMARKS = sorted(module_of(file) for file in python_files("benchmarks"))
PAGES = pages()
MARKS = re.compile(r"<!-- make bench: (begin|end) -->")  # the README's tables go between these
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
PATH = re.compile(r"`((?:kernels|tracer|benchmarks|tests|docs|examples)/[\w./-]+\.\w+)`")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_can_be_imported(name):
    assert importlib.import_module(name).__doc__


@pytest.mark.parametrize("page", PAGES)
def test_pages_hold_no_placeholder(page):
    lines = PAGES[page].splitlines()
    gaps = [n for n, line in enumerate(lines, 1) if "<!--" in line and not MARKS.fullmatch(line)]
    assert not gaps, f"{page}: a comment where a number or text belongs, lines {gaps}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_pages_name_files_that_exist(page):
    """Links are relative to the page, paths in backquotes to the repository."""
    links = [x for x in LINK.findall(PAGES[page]) if "://" not in x]
    broken = [x for x in links if not (ROOT / page).parent.joinpath(x).exists()]
    broken += [x for x in PATH.findall(PAGES[page]) if not (ROOT / x).exists()]
    assert not broken, f"{page}: {broken}"
