"""What every part of the benchmarks shares: its interface, its command line, its process and its tables.

A part is a module that can also be run alone, ``python -m benchmarks.<part> [--quick] [--json] [options]``. It
has

* ``measure(*, quick=False, ...) -> dict``, which returns the results; its keyword arguments are the part's
  options;
* ``report(results) -> str``, which returns the tables as Markdown;

and, where the part has any of these to give,

* ``highlights(results) -> list[Highlight]``: the part's rows of the README's table;
* ``figures(results) -> dict[str, Figure]``: its pictures by name, and ``PICTURES``, a dictionary from each name
  to the text that describes the picture;
* ``exact(results) -> dict[str, float]``: numbers that are the same on every machine: work, spills, allocated
  memory;
* ``ratios(results) -> dict[str, float]``: numbers that a change may not lower: the time of something else
  divided by TRACER's.

All functions but ``measure`` take results as they come back from JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter

import tracer.machine
from benchmarks.measure import Timing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# In the order of the page. A new part is a module of this folder and its name here.
PARTS = (
    "losses",
    "ranks",
    "memory",
    "work",
    "machine_code",
    "others",
    "teacher",
    "step",
    "micro_batches",
    "loader",
)
SOURCES = ("kernels", "tracer", "benchmarks/*.py", "requirements.lock")  # what a measured number depends on


class Highlight(NamedTuple):
    """A row of the README's table: what was measured, TRACER's number, the number to compare, and their ratio."""

    what: str
    ours: str
    compared: str
    ratio: str


class Part:
    """A part by its name, for the page and the check. What its module does not define counts as nothing."""

    def __init__(self, name: str) -> None:
        self.module: Any = importlib.import_module(f"benchmarks.{name}")
        # The first sentence of the module's description stands under the part's heading on the page.
        self.title: str = (self.module.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        self.pictures: Mapping[str, str] = getattr(self.module, "PICTURES", {})

    def report(self, results: dict[str, Any]) -> str:
        """Return the part's tables as Markdown."""
        return self.module.report(results)

    def highlights(self, results: dict[str, Any]) -> list[Highlight]:
        """Return the part's rows of the README's table."""
        return list(self._optional("highlights", results))

    def figures(self, results: dict[str, Any]) -> dict[str, Figure]:
        """Return the part's pictures by name."""
        return dict(self._optional("figures", results))

    def exact(self, results: dict[str, Any]) -> dict[str, float]:
        """Return the numbers that must be the same on every machine."""
        return dict(self._optional("exact", results))

    def ratios(self, results: dict[str, Any]) -> dict[str, float]:
        """Return the time ratios that a change may not lower."""
        return dict(self._optional("ratios", results))

    def _optional(self, function: str, results: dict[str, Any]) -> Any:
        given = getattr(self.module, function, None)
        return given(results) if given else ()


# ---------------------------------------------------------------------------------------------------
# Running a part.


class PartFailed(Exception):
    """A part ended with an error, which it has already printed."""


def run_part(name: str, quick: bool, options: Sequence[str] = ()) -> dict[str, Any]:
    """Run ``python -m benchmarks.<name> --json`` and return what it prints; its progress goes to the terminal.

    ``options`` are more options of the part.

    Raises:
        PartFailed: the process ended with an error.
    """
    command = [
        sys.executable,
        "-m",
        f"benchmarks.{name}",
        "--json",
        *(["--quick"] if quick else []),
        *options,
    ]
    # Each part decides for itself whether Triton interprets, so the caller's setting is not passed on.
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=variables, check=False)
    if done.returncode:
        raise PartFailed(
            f"part {name} failed with exit code {done.returncode}: run python -m benchmarks.{name} to see why"
        )
    return json.loads(done.stdout)


def command_line(
    measure: Callable[..., dict[str, Any]],
    report: Callable[[dict[str, Any]], str],
    argv: list[str] | None = None,
) -> None:
    """Run one part and print its tables, or one JSON document with ``--json``, on the standard output."""
    description = sys.modules[measure.__module__].__doc__
    parser = ArgumentParser(description=description, prog=_program(measure), formatter_class=_Help)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repeats: a first look")
    parser.add_function_arguments(measure, skip={"quick"})
    options = parser.parse_args(argv).as_dict()
    as_json = options.pop("json")
    about = environment()
    if not as_json:
        print(heading(about), flush=True)
    with library_output_to_stderr():
        results = json.loads(json.dumps(measure(**options), default=plain))
    print(json.dumps({**about, "results": results}) if as_json else "\n" + report(results))


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a part's description."""


def _program(measure: Callable[..., Any]) -> str:
    spec = sys.modules[measure.__module__].__spec__
    return f"python -m {spec.name if spec else measure.__module__}"


@contextmanager
def library_output_to_stderr() -> Iterator[None]:
    """Send whatever libraries and their processes print within the block to the standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def progress(text: str) -> None:
    """Print a line on the standard error while a part works; the standard output holds results alone."""
    print(text, file=sys.stderr, flush=True)


def plain(value: Any) -> Any:
    """Convert a :class:`Timing` to a dictionary, as the ``default`` of :func:`json.dumps`."""
    if isinstance(value, Timing):
        return value.__dict__
    raise TypeError(f"{type(value).__name__} cannot be stored in a benchmark's results")


# ---------------------------------------------------------------------------------------------------
# Where a number comes from, and how it is written.


def environment() -> dict[str, Any]:
    """Return the machine, versions, date and commit that a number belongs to."""
    return {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": tracer.machine.versions(),
        "date": date.today().isoformat(),
        "commit": _commit(),
    }


def machine() -> dict[str, Any]:
    """Return processor, cores, memory and GPU, and the processor's instructions for bfloat16 products or None."""
    return tracer.machine.machine() | {"bf16": tracer.machine.bfloat16_unit()}


def _commit() -> str:
    """Return the short hash of the measured checkout, with ``+`` where its files differ from the commit."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], capture_output=True, text=True, check=False, cwd=ROOT)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def describe(machine: Mapping[str, Any]) -> str:
    """Describe a machine in words."""
    bf16 = f", bf16 with {machine['bf16']}" if machine["bf16"] else ""
    host = f"{machine['cores']} cores of {machine['processor']}{bf16}, {machine['memory_gib']:.0f} GiB"
    return f"{machine['gpu']}; {host}" if machine["gpu"] else f"{host}, no GPU"


def heading(about: dict[str, Any]) -> str:
    """Write machine, versions, date and commit in one line."""
    shown = ("torch", "triton", "open_clip_torch")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if name in shown)
    return f"{describe(about['machine'])}; {versions}; {about['date']}, commit {about['commit']}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table whose columns are aligned, so that a terminal shows it well too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
    )
