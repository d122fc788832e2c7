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

PACKAGE = "tracer.kernels"
FOLDER = Path(__file__).parent.parent / "kernels"
# The files of the loss's kernels, each after those that it imports.
FILES = ("_grid", "_triton_tile", "_triton_forward", "_triton_backward", "contrastive_triton")
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
    real = kernel_calls.contrastive_triton
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
        yield kernel_calls.contrastive_triton
    finally:
        kernel_calls.contrastive_triton = real
        sys.modules.update(kept)
        for name, module in kept.items():
            setattr(package, name.rpartition(".")[2], module)
