"""Run every part of the benchmarks that this machine can run, and write the page of its results.

    python -m benchmarks                  all parts → benchmarks/results/<machine>.json, .md and pictures, README
    python -m benchmarks --parts teacher  one part anew, the others as they are
    python -m benchmarks --quick          smaller, into runs/bench, nothing else is touched

Each part runs in a process of its own, one after the other: leave the machine alone meanwhile. A part whose
results are wrong fails, and keeps what was there before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks import _page
from benchmarks._measure import ROOT, machine
from benchmarks._part import PARTS, RESULTS, PartFailed, run_part
from tracer.files import whole_file


def run(parts: Sequence[str] = PARTS, quick: bool = False, folder: Path = RESULTS) -> Path:
    """Measure ``parts`` and write their page into ``folder``; returns its path.

    Raises:
        SystemExit: naming the parts that failed, after the page of the others was written.
    """
    here = machine()
    path = folder / f"{_page.slug(here)}.json"
    document = json.loads(path.read_text()) if path.is_file() else {"parts": {}}
    document["machine"] = here
    failed = []
    for name in (bar := tqdm(parts, unit="part")):
        bar.set_description(name)
        try:
            document["parts"][name] = run_part(name, quick)
        except PartFailed as error:
            failed.append(str(error))
    document["parts"] = {name: document["parts"][name] for name in PARTS if name in document["parts"]}
    with whole_file(path) as part:
        part.write_text(json.dumps(document, indent=1) + "\n")
    page = _page.write(document, path.with_suffix(".md"))
    if failed:
        raise SystemExit("\n".join(failed))
    return page


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; the README gets the tables of a whole run only."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--quick", action="store_true", help="smaller, fewer repeats: a look, not a result")
    chosen = parser.parse_args(argv)
    page = run(chosen.parts, chosen.quick, ROOT / "runs" / "bench" if chosen.quick else RESULTS)
    if not chosen.quick:
        _page.put_into_readme(page.with_suffix(".json"), ROOT / "README.md")
    print(f"results: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
