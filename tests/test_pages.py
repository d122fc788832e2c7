"""Check the pages: their links, the README's commands and its headline, and the table of environment variables."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn import functional as F

from tracer.cli import COMMANDS, parse

ROOT = Path(__file__).parent.parent
PAGES = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tracer/demo/assets/*.md")))
SOURCES = [
    path
    for folder in ("kernels", "tracer", "benchmarks", "tests")
    for path in ROOT.glob(f"{folder}/**/*.py")
    if "tracer/kernels" not in str(path)
]
README = (ROOT / "README.md").read_text()


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_that_a_page_names_exist(page):
    names = re.findall(r"`((?:kernels|tracer|benchmarks|tests|docs|examples)/[\w/.-]+)`", page.read_text())
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing


def test_architecture_lists_every_file():
    """The table of the architecture page and the tree name the same files, folder by folder."""
    listed, folder = set(), ""
    for line in (ROOT / "docs/architecture.md").read_text().splitlines():
        cells = line.split("|")
        if len(cells) != 4:
            continue
        if room := re.match(r" \*\*`([\w/]+/)`", cells[1]):
            folder = room[1]
        names = re.findall(r"`(\w+\.py)`", cells[1]) or (re.findall(r"`(\w+\.py)`", cells[2]) if room else [])
        listed |= {folder + name for name in names}
    files = {page_name(path) for path in SOURCES if not path.name.startswith(("test_", "__init__"))}
    files = {name for name in files if not name.startswith("tests/")}
    assert files <= listed, f"not in the table: {sorted(files - listed)}"
    assert listed <= files, f"in the table, but not there: {sorted(listed - files)}"


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_of_the_readme_runs(block, tiny_config):
    """Run each block in a tiny model's place, with the names that the README leaves to the reader."""
    open_clip.add_model_config(tiny_config)
    pairs, labels = 8, torch.arange(8) // 2
    features = [F.normalize(torch.randn(pairs, 16), dim=1).requires_grad_() for _ in range(4)]
    names = dict(
        zip(("image_features", "text_features", "teacher_image", "teacher_text"), features, strict=True)
    )
    names |= {
        "logit_scale": torch.tensor(20.0),
        "teacher_logit_scale": 20.0,
        "labels": labels,
        "total_steps": 2,
    }
    names["batches"] = [(torch.randn(pairs, 3, 32, 32), torch.randint(0, 99, (pairs, 16)), labels)] * 2
    model = f'"{tiny_config.stem}", pretrained=None'
    exec(block.replace('"ViT-B-16-quickgelu", pretrained="openai"', model), names)
    assert "output" not in names or torch.isfinite(names["output"].loss)


def tracer_commands() -> list[str]:
    """Return the ``tracer`` commands in the blocks of the pages, each on one line."""
    pages = ("docs/adapters.md", "docs/evaluation.md", "docs/data.md", "docs/training.md", "docs/hosts.md")
    text = README + "\n".join((ROOT / page).read_text() for page in pages)
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    given = [line.removeprefix(".venv/bin/") for line in lines if re.match(r"(\.venv/bin/)?tracer ", line)]
    given = [line for line in given if "$" not in line]  # those of tests/evaluation/test_published.py
    return given + [f"tracer demo {options}" for options in re.findall(r'make demo ARGS="(.*?)"', text)]


@pytest.mark.parametrize("command", tracer_commands())
def test_commands_of_the_pages_are_valid(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/config.yaml").write_text("train_data: photos\n")  # of the run that the page made
    name, settings = parse(shlex.split(command, comments=True)[1:])
    assert name in COMMANDS
    settings.validate()


def test_headline_of_the_readme_is_measured():
    results = json.loads((ROOT / "benchmarks/results/amd-epyc-avx-512-2-cores.json").read_text())
    (row,) = (
        row
        for row in results["parts"]["losses"]["results"]["rows"]
        if (row["case"], row["precision"], row["pairs"], row["width"]) == ("full", "bf16", 4096, 512)
    )
    ours, published = row["competitors"]["ours (blocked)"], row["competitors"]["published"]
    seconds = [f"{x['time']['total']['median']:.2g} s" for x in (ours, published)]
    memory = [f"{x['memory'] / 2**20:.0f} MiB" for x in (ours, published)]
    headline = README.partition("```")[0].replace("\n", " ")
    assert f"{seconds[0]} instead of {seconds[1]}" in headline
    assert f"{memory[0]} of extra memory instead of {memory[1]}" in headline


def test_every_environment_variable_is_documented():
    documented = (ROOT / "docs/environment.md").read_text()
    pattern = r"""(?:environ(?:\.get|\.setdefault|\.pop)?|getenv|setenv|delenv)[(\[]\s*["']([A-Z_]+)["']"""
    used = {name for path in SOURCES for name in re.findall(pattern, path.read_text())}
    assert used
    missing = sorted(name for name in used if f"`{name}`" not in documented)
    assert not missing
