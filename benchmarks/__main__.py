"""Run every part of the benchmarks that this machine can run, and write the page of its results.

    python -m benchmarks                  every part → benchmarks/results/<machine>.json, .md, pictures and README
    python -m benchmarks --parts teacher  measure one part again and keep the results of the others
    python -m benchmarks --quick          smaller sizes, into runs/bench; touches no committed results, no README

Each part runs in a process of its own, one after the other: leave the machine otherwise idle meanwhile. A part
whose results are wrong fails, and its earlier results stay.

How a number gets into the README: a part's ``measure`` puts it into benchmarks/results/<machine>.json, its
``report`` into the page beside that file, and its ``highlights`` into a row of the README's table, which is
everything between the two ``make bench`` comments. Never edit those lines or quote a measured number elsewhere
by hand. To change their wording, edit the part and write the page again from the stored numbers, without
measuring: ``python -m benchmarks.page benchmarks/results/<machine>.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks import page
from benchmarks.harness import PARTS, RESULTS, ROOT, PartFailed, machine, run_part
from tracer.files import whole_file


def run(
    parts: Sequence[str] = PARTS, quick: bool = False, folder: Path = RESULTS, options: Sequence[str] = ()
) -> Path:
    """Measure ``parts``, write this machine's results and page into ``folder``, and return the results' path.

    ``options`` are more options of every part.

    Raises:
        SystemExit: a part failed; names every part that did, after the page of the others has been written.
    """
    here = machine()
    path = folder / f"{page.slug(here)}.json"
    document = json.loads(path.read_text()) if path.is_file() else {"parts": {}}
    document["machine"] = here
    failures = []
    for name in (bar := tqdm(parts, unit="part")):
        bar.set_description(name)
        try:
            document["parts"][name] = run_part(name, quick, options)
        except PartFailed as error:
            failures.append(str(error))
    document["parts"] = {name: document["parts"][name] for name in PARTS if name in document["parts"]}
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(document, indent=1) + "\n")
    page.write(document, path.with_suffix(".md"))
    if failures:
        raise SystemExit("\n".join(failures))
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; only a run that is not quick changes the README."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repeats: a first look")
    options = parser.parse_args(argv)
    results = run(options.parts, options.quick, ROOT / "runs" / "bench" if options.quick else RESULTS)
    if not options.quick:
        page.put_into_readme(results, ROOT / "README.md")
    print(f"results: {results.with_suffix('.md').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
