"""Build the browsable site below build/site: the pages of the repository, and the API's reference from docstrings.

The pages keep their places, so that their links hold on GitHub and on the site alike. Every link that leads
nowhere, and every heading that a link names and no page has, ends the build.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from mkdocs.__main__ import cli
from mkdocs.exceptions import Abort

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "build" / "site-sources"

PAGES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md"),
    *("benchmarks/results/*.md", "tracer/demo/assets/*.md"),
)

REFERENCE = {
    "ops": "The fused loss and the average",
    "losses": "Loss modules",
    "teacher": "The moving-average teacher",
    "schedules": "Schedules",
    "adapters": "R-Adapter",
    "diagnostics": "Diagnostics",
    "recipes": "Published settings",
    "train.config": "Settings of finetune",
    "evaluation.config": "Settings of evaluate",
    "demo.config": "Settings of demo and pretrain",
    "train.finished": "Settings of fold, wise and show",
    "demo.across": "Settings of compare",
}


def stage() -> None:
    """Copy the pages and every file that they link to, and write the pages of the reference."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    for page in (page for pattern in PAGES for page in sorted(ROOT.glob(pattern))):
        _copy(page)
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            target = (page.parent / link).resolve()
            if target.is_file() and target.is_relative_to(ROOT):
                _copy(target)
    lines = ["# API reference", "", "Made from the docstrings.", ""]
    for module, title in REFERENCE.items():
        page = SOURCES / "reference" / f"{module}.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(f"# {title}\n\n::: tracer.{module}\n")
        lines.append(f"* [{title}]({module}.md): `tracer.{module}`")
    (SOURCES / "reference/index.md").write_text("\n".join(lines) + "\n")


def _copy(path: Path) -> None:
    target = SOURCES / path.relative_to(ROOT)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def main() -> None:
    """Build the site."""
    stage()
    cli(["build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")], standalone_mode=False)
    print(f"site: {ROOT / 'build/site/index.html'}")


if __name__ == "__main__":
    try:
        main()
    except Abort:
        sys.exit(1)
