"""Bugs planted in the Triton loss kernels, to show that a check of the suite fails on each of them.

A bug is a change of source text. :func:`planted` applies it to a copy of the file, imports the copy and everything
that depends on it beside the real modules, and makes the tests' calls use these.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import kernel_calls
import sigmoid_calls

PACKAGE = "tracer.kernels"
FOLDER = Path(__file__).parent.parent / "kernels"
# The files of the loss's kernels, each after those that it imports.
FILES = (
    "_grid", "_triton_tile", "_triton_forward", "_triton_backward", "contrastive_triton",
    "_triton_sigmoid", "sigmoid_triton",
)  # fmt: skip
# The interpreter remembers modules by identity: none may be freed and another take its place.
_kept: list[ModuleType] = []


class Bug(NamedTuple):
    """A text in a file of kernels/, what takes its place, and which of its occurrences are meant (all)."""

    file: str
    old: str
    new: str
    count: int = 1

    def write(self, folder: Path) -> Path:
        """Write the file with the bug to ``folder`` and return its path."""
        source = (FOLDER / f"{self.file}.py").read_text()
        assert source.count(self.old) == self.count, (
            f"{self.file}.py has {source.count(self.old)}× {self.old!r}"
        )
        path = folder / f"{self.file}.py"
        path.write_text(source.replace(self.old, self.new))
        return path


# Each keeps the number of lines, by which tests of machine code know the statements.
BUGS = {
    "no barrier before the merge": Bug(
        "_triton_forward", "            tl.debug_barrier()\n", "            # no barrier\n"
    ),
    "no barrier after the merge": Bug(
        "_triton_forward", "        tl.debug_barrier()\n\n\n", "        # no barrier\n\n\n"
    ),
    "later rows of tiles merge before earlier ones": Bug(
        "_triton_forward", "merge(seen, new, SLOTS, Z_MAX)", "merge(new, seen, SLOTS, Z_MAX)"
    ),
    "the first row of tiles is parked where the last walk left stale numbers": Bug(
        "_triton_forward", "if row == first_row:", "if row < first_row:"
    ),
    "one row too many counts as inside": Bug(
        "_triton_forward",
        "row_inside, col_inside = offs_n < N, offs_m < M",
        "row_inside, col_inside = offs_n <= N, offs_m < M",
    ),
    "the last text is not loaded": Bug("_triton_tile", "col + offs_m < M", "col + offs_m < M - 1"),
    "the partials of the first program are merged again for each": Bug(
        "_triton_forward",
        "partial_ptr += tl.cdiv(length, block).to(tl.int64) * (K * block)",
        "partial_ptr += 0",
    ),
    "the last row of a strip stays stale": Bug(
        "_triton_backward",
        "row_inside, col_inside = offs_n < last, offs_m < M",
        "row_inside, col_inside = offs_n < last - 1, offs_m < M",
    ),
    "the margin's share of the scale's gradient sums pairs outside the matrix": Bug(
        "_triton_backward", "tl.where(col_inside[None, :], b_at_negatives, 0.0)", "b_at_negatives"
    ),
    "programs overwrite each other's part of the scale's gradient": Bug(
        "_triton_backward",
        "program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)",
        "program = tl.program_id(0) + tl.program_id(1)",
    ),
    "one text too many counts as a pair of the sigmoid form": Bug(
        "_triton_sigmoid", "(offs_m < M)[None, :]", "(offs_m <= M)[None, :]"
    ),
    "programs of the sigmoid form overwrite each other's sums": Bug(
        "_triton_sigmoid",
        "(tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 4",
        "(tl.program_id(0) + tl.program_id(1)) * 4",
    ),
}
BARRIERS = tuple(BUGS)[:2]


@contextmanager
def planted(bug: Bug, folder: Path) -> Iterator[ModuleType]:
    """Yield launchers whose kernels have the bug; the calls of :mod:`kernel_calls` use them inside the block."""
    names = [f"{PACKAGE}.{file}" for file in FILES[FILES.index(bug.file) :]]
    package, kept = (
        sys.modules[PACKAGE],
        {name: sys.modules.pop(name) for name in names if name in sys.modules},
    )
    real, real_walk = kernel_calls.contrastive_triton, sigmoid_calls.WALKS["triton"]
    try:
        spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{bug.file}", bug.write(folder))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        setattr(package, bug.file, module)
        for name in names[1:]:
            importlib.import_module(name)
        _kept.extend(sys.modules[name] for name in names)
        kernel_calls.contrastive_triton = sys.modules[f"{PACKAGE}.contrastive_triton"]
        sigmoid_calls.WALKS["triton"] = sys.modules[f"{PACKAGE}.sigmoid_triton"].walk
        yield kernel_calls.contrastive_triton
    finally:
        kernel_calls.contrastive_triton = real
        sigmoid_calls.WALKS["triton"] = real_walk
        sys.modules.update(kept)
        for name, module in kept.items():
            setattr(package, name.rpartition(".")[2], module)
