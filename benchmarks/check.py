"""Compare a quick run with the committed results: did a change make anything slower or larger?

    make bench-check                  everything
    make bench-check ARGS=--exact     only numbers that are the same on every machine, as in CI

Exact numbers are counted work, spilled registers and allocated memory. Any difference is an error, a lower
number too until ``make bench`` has stored it. Time ratios (the time of something else divided by TRACER's) may
fall by a tolerance. A ratio that fell further is measured once more before it counts. Ratios are compared only
with results of the same kind of machine.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import PARTS, RESULTS, Part, PartFailed, machine, run_part
from benchmarks.page import slug

EXACT = ("memory", "work", "machine_code", "others")  # the parts that time nothing
TOLERANCE = 0.25  # share by which a time ratio may fall
NOT_COMMITTED = "not in the committed results: run make bench"


def differing(committed: Mapping[str, float], measured: Mapping[str, float]) -> list[str]:
    """Return a line for each measured exact number that differs from the committed number, or has none."""
    lines = [f"{name}: {NOT_COMMITTED}" for name in measured.keys() - committed.keys()]
    lines += [
        f"{name}: {value:g}, committed {committed[name]:g}"
        for name, value in measured.items()
        if name in committed and not math.isclose(value, committed[name], rel_tol=1e-9)
    ]
    return sorted(lines)


def slower(committed: Mapping[str, float], measured: Mapping[str, float], tolerance: float) -> list[str]:
    """Return a line for each time ratio that fell by more than the share ``tolerance`` of the committed ratio."""
    return [
        f"{name}: {value:.2f}×, committed {committed[name]:.2f}×"
        for name, value in measured.items()
        if name in committed and value < (1 - tolerance) * committed[name]
    ]


def committed_results(folder: Path, same_machine: bool) -> dict[str, Any]:
    """Return the committed results of this kind of machine or, unless ``same_machine``, the newest of any machine.

    Raises:
        SystemExit: there are none.
    """
    own = folder / f"{slug(machine())}.json"
    if own.is_file():
        return json.loads(own.read_text())
    others = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if same_machine or not others:
        raise SystemExit(f"no committed results for {own.stem}: run make bench first, or pass ARGS=--exact")
    return max(others, key=lambda document: max(part["date"] for part in document["parts"].values()))


def check(exact_only: bool, tolerance: float = TOLERANCE, folder: Path = RESULTS) -> list[str]:
    """Run the parts with ``--quick`` and return a line for everything that differs or became slower."""
    committed = committed_results(folder, same_machine=not exact_only)["parts"]
    problems = []
    for name in EXACT if exact_only else PARTS:
        if name in committed:
            lines = _check_part(name, committed[name]["results"], exact_only, tolerance)
        else:
            lines = [NOT_COMMITTED]
        problems += [f"{name}: {line}" for line in lines]
    return problems


def _check_part(name: str, committed: dict[str, Any], exact_only: bool, tolerance: float) -> list[str]:
    part = Part(name)
    try:
        measured = run_part(name, quick=True)["results"]
        numbers = part.exact(measured)
        lines = differing(part.exact(committed), numbers)
        if numbers:
            print(
                f"{name}: {len(numbers)} exact numbers, {len(numbers) - len(lines)} as committed", flush=True
            )
        return lines if exact_only else lines + _check_ratios(name, committed, measured, tolerance)
    except PartFailed as error:
        return [str(error)]


def _check_ratios(
    name: str, committed: dict[str, Any], measured: dict[str, Any], tolerance: float
) -> list[str]:
    """Return a line for each time ratio that is too low both in ``measured`` and when measured once more."""
    ratios = Part(name).ratios
    before, now = ratios(committed), ratios(measured)
    if not now:
        return []
    compared = now.keys() & before.keys()
    if not compared:
        return ["none of the measured time ratios is in the committed results: run make bench"]
    if slower(before, now, tolerance):
        again = ratios(run_part(name, quick=True)["results"])
        now = {ratio: max(value, again.get(ratio, value)) for ratio, value in now.items()}
    lines = slower(before, now, tolerance)
    print(f"{name}: {len(compared)} time ratios, {len(lines)} fell by more than {tolerance:.0%}", flush=True)
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; ends with exit code 1 where a number differs or became worse."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--exact", action="store_true", help="compare no times")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="share by which a time ratio may fall"
    )
    options = parser.parse_args(argv)
    if problems := check(options.exact, options.tolerance):
        sys.exit("\n".join(["different from the committed results:", *problems]))
    print("as committed")


if __name__ == "__main__":
    main()
