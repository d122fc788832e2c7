"""The rooms of the project and the direction of its imports (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    p for room in ("kernels", "tracer", "benchmarks", "tests", "examples") for p in ROOT.glob(f"{room}/*.py")
]


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_kernels_is_reached_only_as_tracer_kernels():
    """A top-level package called kernels would shadow Hugging Face's, which transformers imports."""
    assert not (ROOT / "kernels/__init__.py").exists()
    link = ROOT / "tracer/kernels"
    assert link.is_symlink()
    assert str(link.readlink()) == "../kernels"
    for path in SOURCES:
        assert "kernels" not in roots(imports(path)), f"{path} imports the top-level name kernels"


def test_kernels_know_torch_and_triton_only():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    for path in ROOT.glob("kernels/*.py"):
        assert roots(imports(path)) <= allowed, path


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("deepspeed", {"train.py", "_average_zero.py"}),
        ("nvidia", {"data.py"}),
        ("triton", set()),
        ("resvg_py", {"icons.py"}),
    ],
)
def test_heavy_libraries_are_imported_by_the_files_that_need_them(library, homes):
    users = {p.name for p in ROOT.glob("tracer/*.py") if library in roots(imports(p))}
    assert users <= homes


def test_importing_the_ops_imports_nothing_heavy():
    """Whoever drops the loss into a loop of their own pays for torch alone."""
    code = (
        "import sys, tracer, tracer.ops, tracer.losses, tracer.teacher;"
        "heavy = {'deepspeed', 'nvidia.dali', 'triton', 'open_clip', 'torchvision', 'matplotlib'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_no_private_attribute_of_deepspeed_outside_its_file():
    private = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "ds_tensor", "bit16_groups")
    for path in ROOT.glob("tracer/*.py"):
        if path.name != "_average_zero.py":
            assert not [name for name in private if name in path.read_text()], path
