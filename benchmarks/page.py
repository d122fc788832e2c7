"""Write the page of a machine's results, its pictures, and the table of them in the README.

    python -m benchmarks.page benchmarks/results/<machine>.json

writes all of these again from stored results, without measuring: after a change of their wording or layout.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Highlight, Part, describe, heading, table
from tracer.errors import UserError

BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"
README_PICTURES = {
    "losses": "batch-size",
    "step": "where-time-goes",
}  # by part, the picture that the README shows


def slug(machine: dict[str, Any]) -> str:
    """Return a file name for the machine, made of its GPU, or else of its processor, bfloat16 unit and cores."""
    if machine["gpu"]:
        name = machine["gpu"]
    else:
        name = f"{machine['processor']} {machine['bf16'] or ''} {machine['cores']} cores"
    plain = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*GHz", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def write(document: dict[str, Any], path: Path) -> None:
    """Write the page of all parts of ``document`` to ``path``, and their pictures beside it."""
    lines = [
        f"# Benchmarks: {describe(document['machine'])}",
        "",
        "Written by `make bench`. Times are medians of interleaved runs, with the 20th and 80th percentile in "
        "brackets. Memory is the peak beyond the inputs, measured in a fresh process. Numbers that were counted "
        "or estimated instead of measured say so.",
    ]
    for name, measured in document["parts"].items():
        part, results = Part(name), measured["results"]
        lines += ["", f"## {name}", "", part.title, "", f"*{heading(measured)}*", ""]
        for picture, figure in part.figures(results).items():
            file = _picture_file(path, name, picture)
            figure.savefig(file, dpi=150, bbox_inches="tight", metadata={"Software": None})
            lines += [f"![{part.pictures[picture]}]({file.name})", ""]
        lines.append(part.report(results).strip())
    path.write_text("\n".join(lines) + "\n")


def _picture_file(page: Path, part: str, picture: str) -> Path:
    return page.with_name(f"{page.stem}-{part}-{picture}.png")


def readme_section(document: dict[str, Any], page: Path, root: Path) -> str:
    """Return what the README shows of ``document``: the machine, the highlights of all parts, and two pictures."""
    rows, pictures = [], []
    commits: dict[str, set[str]] = {}
    for name, measured in document["parts"].items():
        part = Part(name)
        rows += [list(Highlight(*row)) for row in part.highlights(measured["results"])]
        commits.setdefault(measured["date"], set()).add(measured["commit"])
        if name in README_PICTURES:
            picture = README_PICTURES[name]
            file = _picture_file(page, name, picture)
            pictures.append(f"![{part.pictures[picture]}]({file.relative_to(root)})")
    when = "; ".join(
        f"{day}, commit{'s' if len(hashes) > 1 else ''} {', '.join(sorted(hashes))}"
        for day, hashes in sorted(commits.items())
    )
    head = (
        f"Measured by `make bench` on {describe(document['machine'])} ({when}). A ratio of 2× means that TRACER "
        "takes half the time, or half the work where work is counted. Counts (products, spilled registers) are "
        "the same on every machine, and need not have been made on this one."
    )
    more = (
        "All sizes, the spread of each time, where the time of a training step goes, and where TRACER is slower: "
        f"[{page.stem}]({page.relative_to(root)})."
    )
    return "\n\n".join([head, table(["measured", "TRACER", "compared with", "ratio"], rows), more, *pictures])


def put_into_readme(results: Path, readme: Path) -> None:
    """Replace what stands between the README's two marks by the section of ``results``.

    Raises:
        UserError: the README does not have exactly one pair of marks.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(
            f"'{readme}' lacks the marks of the benchmarks' table: add one line {BEGIN} and one {END}"
        )
    section = readme_section(json.loads(results.read_text()), results.with_suffix(".md"), readme.parent)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n\n{section}\n\n{END}{after}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="a JSON file of benchmarks/results")
    results = parser.parse_args(argv).results.resolve()
    write(json.loads(results.read_text()), results.with_suffix(".md"))
    put_into_readme(results, ROOT / "README.md")
    print(f"page: {results.with_suffix('.md').relative_to(ROOT)}, and README.md")


if __name__ == "__main__":
    main()
