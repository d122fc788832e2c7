"""The page of a machine's results, and the tables of it that the README shows."""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot

from benchmarks._measure import describe, table
from benchmarks._part import Highlight, heading
from tracer.errors import UserError

BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"
IN_README = {
    "losses": "batch-size",
    "step": "where-time-goes",
}  # parts, and the picture that the README shows


def slug(machine: dict[str, Any]) -> str:
    """A file name for the machine: its GPU, or its processor, cores and bf16 unit."""
    if machine["gpu"]:
        name = machine["gpu"]
    else:
        name = f"{machine['processor']} {machine['bf16'] or ''} {machine['cores']} cores"
    plain = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*GHz", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def load(name: str) -> Any:
    """The module of a part. What it sets in the environment for its own process does not stay."""
    kept = dict(os.environ)
    try:
        return importlib.import_module(f"benchmarks.{name}")
    finally:
        os.environ.clear()
        os.environ.update(kept)


def write(document: dict[str, Any], path: Path) -> Path:
    """Write the whole page to ``path``, its pictures beside it; returns ``path``."""
    lines = [
        f"# Benchmarks: {describe(document['machine'])}",
        "",
        "Written by `make bench`. Medians with the 20th and 80th percentile of interleaved runs; memory is the "
        "peak beyond the inputs, in a fresh process. What is counted or estimated is called so.",
    ]
    for name, part in document["parts"].items():
        module = load(name)
        lines += ["", f"## {name}", "", _first_sentence(module), "", f"*{heading(part)}*", ""]
        for picture, figure in module.figures(part["results"]).items():
            file = path.with_name(f"{path.stem}-{name}-{picture}.png")
            figure.savefig(file, dpi=150, bbox_inches="tight", metadata={"Software": None})
            pyplot.close(figure)
            lines += [f"![{name}: {picture.replace('-', ' ')}]({file.name})", ""]
        lines.append(module.report(part["results"]).strip())
    path.write_text("\n".join(lines) + "\n")
    return path


def _first_sentence(module: Any) -> str:
    return module.__doc__.split("\n\n")[0].replace("\n", " ")


def readme_section(document: dict[str, Any], page: Path, root: Path) -> str:
    """The rows of all parts that a newcomer should see, the machine's name, and two pictures."""
    rows, pictures = [], []
    for name, part in document["parts"].items():
        module = load(name)
        rows += [list(Highlight(*row)) for row in module.highlights(part["results"])]
        if name in IN_README:
            file = page.with_name(f"{page.stem}-{name}-{IN_README[name]}.png")
            pictures.append(f"![{_first_sentence(module)}]({file.relative_to(root)})")
    commits = sorted({f"{part['date']}, commit {part['commit']}" for part in document["parts"].values()})
    head = f"Measured on {describe(document['machine'])} ({'; '.join(commits)}), by `make bench`:"
    link = f"[{page.stem}]({page.relative_to(root)})"
    more = f"Spreads, all sizes, where a step's time goes, and what falls short: {link}."
    return "\n\n".join([head, table(["", "ours", "theirs", ""], rows), more, *pictures])


def put_into_readme(results: Path, readme: Path) -> None:
    """Replace what stands between the README's two marks by the tables of ``results``.

    Raises:
        UserError: the README has lost its marks.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"'{readme}' has no place for the tables: put {BEGIN} and {END} around it")
    section = readme_section(json.loads(results.read_text()), results.with_suffix(".md"), readme.parent)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n\n{section}\n\n{END}{after}")
