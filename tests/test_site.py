"""The browsable site: it builds, its reference is that of the docstrings, and a broken link ends the build."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "docs/site.py"], cwd=root, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path) -> Path:
    """The repository's pages and sources, without its history."""
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.json.gz")
    for name in ("docs", "benchmarks", "tracer", "kernels", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    for file in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml", ROOT / "LICENSE"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_the_site_has_every_page_and_the_reference(copy):
    done = build(copy)
    assert done.returncode == 0, done.stderr
    site = copy / "build/site"
    for page in copy.glob("docs/*.md"):
        assert (site / "docs" / f"{page.stem}.html").is_file(), page.name
    assert "teacher_logit_scale" in (site / "reference/ops.html").read_text()


def test_links_that_lead_nowhere_end_the_build(copy):
    with (copy / "README.md").open("a") as page:
        page.write("\n[x](docs/nowhere.md), [x](docs/losses.md#no-such-heading)\n")
    done = build(copy)
    assert done.returncode == 1
    assert "docs/nowhere.md" in done.stderr
    assert "no-such-heading" in done.stderr
