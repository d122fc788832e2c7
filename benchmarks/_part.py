"""What the parts of the benchmarks have in common.

A part is a module that can be run alone, ``python -m benchmarks.<part> [--quick] [--json] [options]``, with

* ``measure(*, quick=False, ...) -> dict``: what was found. Its keyword arguments are the part's options;
* ``report(results) -> str``: the tables, as Markdown;
* ``highlights(results) -> list``: its rows of the README's table, each :class:`Highlight`;
* ``figures(results) -> dict``: pictures by name, as matplotlib figures;
* ``exact(results) -> dict``: numbers by name that are the same on every machine: work, spills, allocated memory;
* ``ratios(results) -> dict``: numbers by name that a change may not lower: the other's time divided by ours.

All but the first take results as they come back from JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from benchmarks._measure import ROOT, Timing, describe, environment

RESULTS = ROOT / "benchmarks" / "results"
# In the order of the page. Ranks and loaders for larger data sets get parts of their own, named here.
PARTS = ("losses", "memory", "work", "machine_code", "teacher", "step", "loader")


class Highlight(NamedTuple):
    """A row of the README's table."""

    what: str
    ours: str
    theirs: str
    ratio: str


def command_line(
    measure: Callable[..., dict[str, Any]],
    report: Callable[[dict[str, Any]], str],
    argv: list[str] | None = None,
) -> None:
    """Run a part alone: its tables, or with ``--json`` one JSON document, go to the standard output."""
    about_part = sys.modules[measure.__module__].__doc__
    parser = ArgumentParser(description=about_part, prog=_program(measure), formatter_class=_Help)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--quick", action="store_true", help="smaller sizes, fewer repeats: a look, not a result"
    )
    parser.add_function_arguments(measure, skip={"quick"})
    options = parser.parse_args(argv).as_dict()
    as_json = options.pop("json")
    about = environment()
    if not as_json:
        print(heading(about), flush=True)
    with results_alone():
        results = json.loads(json.dumps(measure(**options), default=plain))
    print(json.dumps({**about, "results": results}) if as_json else "\n" + report(results))


@contextmanager
def results_alone() -> Iterator[None]:
    """What libraries and their processes print meanwhile goes to the standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves the lines of a part's description as they are."""


def _program(measure: Callable[..., Any]) -> str:
    spec = sys.modules[measure.__module__].__spec__
    return f"python -m {spec.name if spec else measure.__module__}"


class PartFailed(Exception):
    """A part ended with an error, which it has printed itself."""


def run_part(name: str, quick: bool) -> dict[str, Any]:
    """What ``python -m benchmarks.<name> --json`` prints; its progress and errors go to the terminal.

    Raises:
        PartFailed: it ended with an error.
    """
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *(["--quick"] if quick else [])]
    # A part decides itself whether Triton interprets: nothing that was imported here may decide it.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise PartFailed(f"{name} failed (exit code {done.returncode}): python -m benchmarks.{name} says why")
    return json.loads(done.stdout)


def heading(about: dict[str, Any]) -> str:
    """Machine, versions, date and commit in one line."""
    named = ", ".join(
        f"{n} {v}" for n, v in about["versions"].items() if n in ("torch", "triton", "open_clip_torch")
    )
    return f"{describe(about['machine'])}; {named}; {about['date']}, commit {about['commit']}"


def plain(value: Any) -> Any:
    """For JSON: a timing as a dictionary."""
    if isinstance(value, Timing):
        return value.__dict__
    raise TypeError(f"{type(value).__name__} has no place in a benchmark's results")


def progress(text: str) -> None:
    """A line on the terminal while a part works; results alone go to the standard output."""
    print(text, file=sys.stderr, flush=True)
