"""Everything that a graphics card can show of this project: one command, one page.

    make gpu                          all checks, then all benchmarks → runs/gpu/page.md
    make gpu ARGS=--quick             the benchmarks in their quick form
    make gpu ARGS=--miniature         the same command without a GPU: in Triton's interpreter, in small sizes

The command refuses to start where there is a GPU that torch cannot see. It ends with exit code 1 where a check
or a benchmark failed, and the page names it. The checks are tests of this repository, which run on the GPU where
there is one: every entry of the tile table against float64, two hundred equal repeats, captured graphs, other
streams and devices, the teacher, DALI's decoder, and training at each ZeRO stage. docs/gpu.md says more, and how
to install with ROCm and CUDA 12.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from benchmarks import page
from benchmarks.__main__ import run
from benchmarks.harness import PARTS, ROOT, machine, progress, table
from tracer.files import whole_file

FOLDER = ROOT / "runs" / "gpu"
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}  # for processes that shall see no GPU
DALI = "tests/data/test_loader.py::test_the_device_decodes_as_the_cpu_does"
CHECKS = (
    "tests/kernels",
    "tests/benchmarks/test_gpu.py",
    "tests/test_ops.py",
    "tests/test_ops_autograd.py",
    "tests/test_teacher.py",
    DALI,
    "tests/train/test_on_a_device.py",
)
MINIATURE = ("tests/kernels/test_tile_table.py", "tests/kernels/test_devices.py", DALI)
MINIATURE_PARTS, MINIATURE_OPTIONS = ("work",), ("--sizes", "[[64, 16]]")


class Outcome(NamedTuple):
    """What the tests of a file came to."""

    file: str
    passed: int
    seconds: float
    problems: tuple[str, ...]  # a line for each test that failed


def require_card(miniature: bool, devices: Path = Path("/dev")) -> None:
    """Refuse a GPU that torch cannot see, and a machine without one unless it is to run in miniature.

    Args:
        miniature: whether the interpreter may take the place of a GPU.
        devices: the folder of device files.

    Raises:
        SystemExit: says what is missing and what to do.
    """
    if torch.cuda.is_available():
        return
    if present := sorted([*devices.glob("nvidia[0-9]*"), *devices.glob("kfd"), *devices.glob("dxg")]):
        raise SystemExit(
            f"there is a GPU ({present[0]}) but torch {torch.__version__} cannot see it: {_why_unseen()}; "
            "docs/gpu.md says which build to install"
        )
    if not miniature:
        raise SystemExit("there is no GPU here: run make gpu ARGS=--miniature for the interpreter")


def _why_unseen() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "it was built for CPUs"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or os.environ.get("HIP_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES hides it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return "it finds no device"


def facts(miniature: bool) -> dict[str, str]:
    """Return what a result depends on: card, slice, multiprocessors, driver and versions."""
    known = {"torch": torch.__version__, "triton": triton.__version__}
    if miniature or not torch.cuda.is_available():
        return {"card": "none: Triton's interpreter on the CPU", **known}
    own = torch.cuda.get_device_properties()
    part = re.search(r"MIG (\S+)", own.name)
    return {
        "card": own.name,
        "slice": part[1] if part else "the whole card",
        "cards visible": str(torch.cuda.device_count()),
        "multiprocessors": str(own.multi_processor_count),
        "memory": f"{own.total_memory / 2**30:.0f} GiB",
        "architecture": own.gcnArchName if torch.version.hip else f"sm_{own.major}{own.minor}",
        "driver": _driver(),
        "runtime": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
        **known,
    }


def _driver() -> str:
    amd = Path("/sys/module/amdgpu/version")
    if torch.version.hip:
        return amd.read_text().strip() if amd.is_file() else "amdgpu of the kernel"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: nvidia-smi does not run here"
    return said[0] if said else "unknown"


def run_checks(tests: Sequence[str], miniature: bool) -> list[Outcome]:
    """Run tests in a process of their own and return the outcome of each file, in their order."""
    hidden = HIDDEN if miniature else {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:benchmark", "-q", f"--junitxml={report}", *tests]
        variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(command, cwd=ROOT, env=variables | hidden, stdout=sys.stderr, check=False)
        outcomes = outcomes_of(report) if report.is_file() else []
    failed = any(outcome.problems for outcome in outcomes)
    if done.returncode not in (0, 1) or (done.returncode == 1 and not failed) or not outcomes:
        outcomes.append(Outcome("pytest", 0, 0.0, (f"pytest ended with exit code {done.returncode}",)))
    return outcomes


def outcomes_of(report: Path) -> list[Outcome]:
    """Read pytest's report in the format of JUnit."""
    files: dict[str, list[ET.Element]] = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        # A module that cannot be imported has no class: its own name is that of the file.
        files.setdefault(case.get("classname") or case.get("name") or "?", []).append(case)
    outcomes = []
    for module, cases in files.items():
        wrong = {case: said for case in cases if (said := _problem(case))}
        name = module.replace(".", "/") + ".py"
        seconds = sum(float(case.get("time", 0)) for case in cases)
        problems = tuple(f"{case.get('name')}: {said}" for case, said in wrong.items())
        outcomes.append(Outcome(name, len(cases) - len(wrong), seconds, problems))
    return outcomes


def _problem(case: ET.Element) -> str:
    """Return in one line why a test did not pass, "" if it did; one that was skipped did not."""
    for kind in ("failure", "error", "skipped"):
        if (verdict := case.find(kind)) is not None:
            said = (verdict.get("message") or kind).strip().splitlines()
            return f"{kind}: {said[0][:300] if said else ''}"
    return ""


def write(
    path: Path, about: dict[str, str], notes: Sequence[str], outcomes: Sequence[Outcome], measured: str
) -> None:
    """Write the page: the card, what was checked, what failed, and the page of the benchmarks."""
    wrong = [f"* {outcome.file}, {line}" for outcome in outcomes for line in outcome.problems]
    rows = [[o.file, str(o.passed), str(len(o.problems)), f"{o.seconds:.1f} s"] for o in outcomes]
    total = sum(o.passed for o in outcomes)
    sections = [
        f"# {about['card']}",
        table(["", ""], [list(item) for item in about.items()]),
        f"## Checks: {total} passed, {len(wrong)} failed",
        *notes,
        table(["tests", "passed", "failed", "time"], rows),
        *(["### What failed", "\n".join(wrong)] if wrong else []),
        re.sub(r"^#", "##", measured, flags=re.MULTILINE),
    ]
    with whole_file(path) as unfinished:
        unfinished.write_text("\n\n".join(sections) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: torch cannot see the GPU, or a check or a benchmark failed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--miniature", action="store_true", help="small, and without a GPU")
    parser.add_argument("--quick", action="store_true", help="the benchmarks in their quick form")
    parser.add_argument("--checks", nargs="*", metavar="TEST", help="these tests instead of all checks")
    parser.add_argument("--parts", nargs="*", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the page")
    options = parser.parse_args(argv)
    small = options.miniature
    require_card(small)
    about = facts(small)
    progress("\n".join(f"{name}: {value}" for name, value in about.items()))
    options.output.mkdir(parents=True, exist_ok=True)

    checks, notes = list(options.checks or (MINIATURE if small else CHECKS)), []
    if DALI in checks and importlib.util.find_spec("nvidia.dali") is None:
        checks.remove(DALI)
        notes.append("DALI is not installed, so its decoder was not checked.")
    outcomes = run_checks(checks, small)
    parts = tuple(options.parts) if options.parts is not None else MINIATURE_PARTS if small else PARTS
    if small:
        os.environ |= HIDDEN  # the benchmarks' processes see no GPU either
    measured, problem = benchmarked(parts, options.quick or small, options.output)
    if problem:
        outcomes.append(Outcome("benchmarks", 0, 0.0, (problem,)))
    path = options.output / "page.md"
    write(path, about, notes, outcomes, measured)
    print(f"page: {path}")
    if wrong := [line for outcome in outcomes for line in outcome.problems]:
        sys.exit(f"{len(wrong)} failed: see {path}")


def benchmarked(parts: tuple[str, ...], quick: bool, folder: Path) -> tuple[str, str]:
    """Run parts of the benchmarks and return their page, and what failed in one line or "".

    What an earlier run left in the folder is removed first: the page is that of one run.
    """
    path, problem = folder / f"{page.slug(machine())}.md", ""
    for old in (path, path.with_suffix(".json"), *folder.glob(f"{path.stem}-*.png")):
        old.unlink(missing_ok=True)
    options = MINIATURE_OPTIONS if quick and parts == MINIATURE_PARTS else ()
    try:
        if parts:
            run(parts, quick, folder, options)
    except SystemExit as failed:  # the page of the other parts has been written
        problem = str(failed).replace("\n", "; ")
    return (path.read_text() if parts and path.is_file() else "# No benchmarks"), problem


if __name__ == "__main__":
    main()
