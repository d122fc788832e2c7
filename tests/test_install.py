"""The wheel and the sdist: what they hold, and how they behave with the declared dependencies alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
import source_rules as rules

from tracer.errors import how_to_install

REBUILD = "import sys; from setuptools import build_meta as b; to = sys.argv[1]; b.build_wheel(to)"
BUILD = f"{REBUILD}; b.build_sdist(to)"


def build(source: Path, target: Path, code: str = BUILD) -> None:
    target.mkdir()
    done = subprocess.run([sys.executable, "-c", code, target], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of the repository."""
    root = tmp_path_factory.mktemp("build")
    names = (
        "tracer",
        "kernels",
        "tests",
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
    )
    for name in names:
        path = rules.ROOT / name
        if path.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, root / "source" / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(path, root / "source" / name)
    build(root / "source", root / "dist")
    return root / "dist"


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.startswith("tracer/")}


def test_the_wheel_holds_the_types_mark_and_every_asset(built):
    names = content(next(built.glob("*.whl"))).keys()
    assert {"tracer/py.typed", "tracer/report/page.html.j2", "tracer/kernels/contrastive.py"} <= names
    assert any(name.endswith("tracer-demo.safetensors") for name in names)


def test_the_sdist_builds_the_same_wheel_and_holds_no_tests(built, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        assert not [name for name in archive.getnames() if "/tests" in name]
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    build(source, tmp_path / "dist", REBUILD)
    assert content(next((tmp_path / "dist").glob("*.whl"))) == content(next(built.glob("*.whl")))


def required(distributions: list[Distribution]) -> list[Distribution]:
    """Return these distributions and all that they require, extras left out."""
    closure: dict[str, Distribution] = {}
    waiting = list(distributions)
    while waiting:
        one = waiting.pop()
        closure[one.metadata["Name"]] = one
        for text in one.requires or ():
            name = re.match(r"[\w.-]+", text)[0]  # type: ignore[index]
            if "extra ==" in text or name in closure:
                continue
            try:
                waiting.append(distribution(name))
            except PackageNotFoundError:
                assert ";" in text, f"{one.metadata['Name']} needs {text}"  # another platform or Python
    return list(closure.values())


@pytest.fixture(scope="module")
def bare(built, tmp_path_factory) -> Path:
    """A folder for PYTHONPATH: the unpacked wheel, and links to what it requires without extras."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        archive.extractall(site)
    ours = Distribution.at(next(site.glob("*.dist-info")))
    for one in required([ours]):
        if one is ours:
            continue
        for file in one.files or ():
            parts = file.parts
            if ".." in parts or "__pycache__" in parts:
                continue
            top = one.locate_file(parts[0])
            shared = Path(top).is_dir() and not (Path(top) / "__init__.py").exists() and len(parts) > 2
            part = Path(*parts[:2]) if shared and "dist-info" not in parts[0] else Path(parts[0])
            if not os.path.lexists(site / part):
                (site / part).parent.mkdir(exist_ok=True)
                (site / part).symlink_to(Path(one.locate_file(part)).resolve())
    return site


def in_bare(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the standard library and ``site`` alone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        env=environment | {"PYTHONPATH": str(site)},
        cwd=site,
        capture_output=True,
        text=True,
    )


OPS = """
import torch
from torch.nn.functional import normalize
from tracer.losses import ClipLoss, TracerLoss
from tracer.ops import contrastive_loss
from tracer.teacher import WMA, build_teacher
import tracer.adapters, tracer.diagnostics
image, text = (normalize(torch.randn(6, 8), dim=1).requires_grad_() for _ in range(2))
contrastive_loss(image, text, torch.tensor(10.0), labels=torch.arange(6) // 2).loss.backward()
teacher = build_teacher(torch.nn.Linear(8, 8), WMA(3))
teacher.update(1)
for missing in ("deepspeed", "open_clip", "nvidia.dali", "torchmetrics", "jsonargparse"):
    try:
        __import__(missing)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{missing} is here: the test proves nothing")
print(float(image.grad.norm()) > 0)
"""


def test_the_ops_work_with_torch_alone(bare):
    done = in_bare(bare, "-c", OPS)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("argument", ["--help", "finetune"])
def test_the_command_line_without_its_libraries_is_one_line_that_names_the_extra(bare, argument):
    done = in_bare(bare, "-m", "tracer", argument)
    assert done.returncode == 2
    assert done.stderr == (
        "tracer: error: the command line needs docstring_parser, which is not installed: "
        "pip install 'tracer-clip[train]'\n"
    )


def test_a_command_without_one_of_its_libraries_is_one_line(drawings):
    """As where somebody installed the libraries one by one."""
    code = (
        "import sys; sys.modules['torchmetrics'] = None; from tracer.cli import main; "
        f"sys.exit(main(['evaluate', '--eval_data.a', {str(drawings / 'train.csv')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=rules.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "tracer: error: this command needs torchmetrics, which is not installed: pip install 'tracer-clip[train]'"
    )


@pytest.mark.parametrize(
    ("library", "extras"), [("nvidia.dali.fn", "train,dali"), ("pyarrow", "train,parquet"), ("rich", "train")]
)
def test_a_missing_library_is_named_with_its_extra(library, extras):
    name = library.partition(".")[0]
    assert how_to_install(library) == (
        f"needs {name}, which is not installed: pip install 'tracer-clip[{extras}]'"
    )


def test_the_installed_script_is_the_guarded_one(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "tracer = tracer.__main__:main" in archive.read(name).decode()
