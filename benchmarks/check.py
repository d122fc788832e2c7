"""Compare with the committed results: has a change made something slower, larger, or spill?

    make bench-check                  everything
    make bench-check ARGS=--exact     only what is the same on every machine, as in CI

Exact are counted work, spilled registers and allocated memory: any growth is an error, and any fall too until
``make bench`` has written it down. Time ratios (the others' time divided by ours) may fall by a tolerance, and
what fell further is measured once more before it counts; they are compared only with results of the same kind of
machine.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _page
from benchmarks._measure import machine
from benchmarks._part import PARTS, RESULTS, PartFailed, run_part

EXACT = ("memory", "work", "machine_code")  # the parts without a clock
TOLERANCE = 0.25  # of a time ratio


def differing(committed: Mapping[str, float], found: Mapping[str, float]) -> list[str]:
    """A line for each exact number that is not what was committed, or that only one side has."""
    lines = [
        f"{name}: not in the committed results, run make bench" for name in found.keys() - committed.keys()
    ]
    lines += [
        f"{name}: {value:g}, committed {committed[name]:g}"
        for name, value in found.items()
        if name in committed and not math.isclose(value, committed[name], rel_tol=1e-9)
    ]
    return sorted(lines)


def slower(committed: Mapping[str, float], found: Mapping[str, float], tolerance: float) -> list[str]:
    """A line for each time ratio that fell by more than ``tolerance`` of what was committed."""
    return [
        f"{name}: {value:.2f}×, committed {committed[name]:.2f}×"
        for name, value in found.items()
        if name in committed and value < (1 - tolerance) * committed[name]
    ]


def committed_results(folder: Path, same_machine: bool) -> dict[str, Any]:
    """The committed results of this machine's kind; failing that, for exact numbers, the newest of any.

    Raises:
        SystemExit: there are none.
    """
    mine = folder / f"{_page.slug(machine())}.json"
    if mine.is_file():
        return json.loads(mine.read_text())
    others = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if same_machine or not others:
        raise SystemExit(f"no committed results for {mine.stem}: run make bench first, or ARGS=--exact")
    return max(others, key=lambda document: max(part["date"] for part in document["parts"].values()))


def _compare_ratios(name: str, found: dict[str, Any], before: dict[str, Any], tolerance: float) -> list[str]:
    """Lines for the time ratios of a part that fell twice, in ``found`` and when measured once more."""
    ratios = _page.load(name).ratios
    then, now = ratios(before), ratios(found)
    if not now:
        return []
    compared = now.keys() & then.keys()
    if not compared:
        return ["no time ratio is among the committed ones, run make bench"]
    if slower(then, now, tolerance):
        again = ratios(run_part(name, quick=True)["results"])
        now = {what: max(value, again.get(what, value)) for what, value in now.items()}
    late = slower(then, now, tolerance)
    print(f"{name}: {len(compared)} time ratios, {len(late)} fell by more than {tolerance:.0%}", flush=True)
    return late


def check(exact_only: bool, tolerance: float = TOLERANCE, folder: Path = RESULTS) -> list[str]:
    """Run the parts quickly and return a line for everything that got worse."""
    committed = committed_results(folder, same_machine=not exact_only)["parts"]
    bad = []
    for name in EXACT if exact_only else PARTS:
        if name not in committed:
            bad.append(f"{name}: not in the committed results, run make bench")
            continue
        before, exact = committed[name]["results"], _page.load(name).exact
        try:
            found = run_part(name, quick=True)["results"]
            now = exact(found)
            worse = differing(exact(before), now)
            if now:
                print(f"{name}: {len(now)} exact numbers, {len(now) - len(worse)} as committed", flush=True)
            bad += [f"{name}: {line}" for line in worse]
            if not exact_only:
                bad += [f"{name}: {line}" for line in _compare_ratios(name, found, before, tolerance)]
        except PartFailed as error:
            bad.append(str(error))
    return bad


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; ends with exit code 1 when something got worse."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--exact", action="store_true", help="leave out what a clock tells")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="share by which a time ratio may fall"
    )
    chosen = parser.parse_args(argv)
    if bad := check(chosen.exact, chosen.tolerance):
        sys.exit("\n".join(["different from the committed results:", *bad]))
    print("as committed")


if __name__ == "__main__":
    main()
