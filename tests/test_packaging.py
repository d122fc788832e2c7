"""What a user installs and imports: the files that setup.py ships, and what an import loads and leaves untouched.

The imports are tried in fresh interpreters, a few at a time, since each start takes seconds.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import source_rules as rules
from setuptools.dist import Distribution

ROOT = rules.ROOT
PRODUCT = rules.python_files("kernels", "tracer")
MODULES = sorted(rules.module_of(file) for file in PRODUCT)

HEAVY = ("triton", "deepspeed", "nvidia.dali", "open_clip", "torchvision", "matplotlib")
PRIVATE_OF_DEEPSPEED = (
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "ds_tensor",
    "bit16_groups",
)


def test_kernels_is_reached_only_as_tracer_kernels():
    """A top-level package called kernels would shadow the one of Hugging Face, which transformers imports."""
    assert not (ROOT / "kernels/__init__.py").exists()
    link = ROOT / "tracer/kernels"
    assert link.is_symlink()
    assert str(link.readlink()) == "../kernels"
    sources = rules.python_files("kernels", "tracer", "benchmarks", "tests", "examples")
    for one in rules.all_imports(sources):
        assert one.target.split(".")[0] != "kernels", f"{one}: write tracer.kernels"


def test_no_private_attribute_of_deepspeed_outside_its_file():
    for file, source in PRODUCT.items():
        if "zero" not in Path(file).name:
            assert not [name for name in PRIVATE_OF_DEEPSPEED if name in source], file


def test_setup_ships_every_file(monkeypatch):
    """Python files and data files alike: a room or an asset that setup.py does not list is missing in a wheel."""
    arguments = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", arguments.update)
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__file__": "setup.py"})
    build = Distribution({**arguments, "script_name": "setup.py"}).get_command_obj("build_py")
    build.ensure_finalized()
    shipped = {Path(file) for _, _, file in build.find_all_modules()}
    shipped |= {Path(source, name) for _, source, _, names in build.data_files for name in names}
    present = {
        path.relative_to(ROOT)
        for room in ("kernels", "tracer")
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "tracer/kernels/" not in path.as_posix()
    }
    assert shipped == present


def run_fresh(code: str, *arguments: str) -> dict:
    """Run ``code`` in a new interpreter and return the JSON that it prints last."""
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


LIGHT = """
import json, pathlib, sys
sys.path.insert(0, "")
heavy = json.loads(sys.argv[1])
loaded = {}
def note(step):
    loaded[step] = [name for name in heavy if name in sys.modules]
for name in ("tracer", "tracer.ops", "tracer.losses", "tracer.teacher", "tracer.adapters"):
    __import__(name)
    note(name)
from tracer.data.build import read_index
read_index(pathlib.Path(sys.argv[2]))
note("reading a CSV")
print(json.dumps(loaded))
"""

HELP = """
import contextlib, io, json, runpy, sys
sys.path.insert(0, "")
sys.argv = ["tracer", "--help"]
shown = io.StringIO()
with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
    runpy.run_module("tracer.cli", run_name="__main__")
print(json.dumps({"help": shown.getvalue(), "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def light(drawings):
    return run_fresh(LIGHT, json.dumps(HEAVY), str(drawings / "train.csv"))


@pytest.mark.parametrize(
    "name", ["tracer", "tracer.ops", "tracer.losses", "tracer.teacher", "tracer.adapters"]
)
def test_importing_the_library_loads_nothing_heavy(light, name):
    """Whoever drops the loss into a loop of their own pays for torch alone."""
    assert light[name] == []


def test_reading_a_csv_loads_no_dali(light):
    assert not {"nvidia.dali", "deepspeed"} & set(light["reading a CSV"])


def test_help_loads_nothing_heavy():
    result = run_fresh(HELP)
    assert "finetune" in result["help"]
    assert not set(HEAVY) & set(result["modules"])


# Third-party libraries are imported first, since the project does not answer for what they do to the process:
# whatever changes afterwards was changed by a module of the project.
TRIED = """
import importlib, json, logging, os, sys, types, warnings
sys.path.insert(0, "")
third_party, modules = json.loads(sys.argv[1])
for name in third_party:
    importlib.import_module(name)
import deepspeed, matplotlib, open_clip, torch

def settings():
    root = logging.getLogger()
    return {
        "os.environ": dict(os.environ),
        "sys.path": list(sys.path),
        "the working directory": os.getcwd(),
        "warnings.filters": list(warnings.filters),
        "the root logger": [root.level, *map(id, root.handlers)],
        "deepspeed.ops.__compatible_ops__": dict(deepspeed.ops.__compatible_ops__),
        "matplotlib.rcParams": dict(matplotlib.rcParams),
        "open_clip's models": open_clip.list_models(),
        "torch's defaults": [
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.matmul.allow_tf32,
        ],
    }

def attributes():
    'Every attribute of every module of others, and of the classes defined there.'
    all_of_them = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("tracer", "__main__", "__mp_main__") or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(vars(module).items()):
            all_of_them[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                all_of_them |= {(name, key + "." + inner): x for inner, x in list(vars(value).items())}
    return all_of_them

changes, failures = [], {}
settings()  # some of these load what they answer from
before, first = settings(), attributes()
for name in modules:
    try:
        importlib.import_module(name)
    except Exception as error:
        failures[name] = repr(error)
    after = settings()
    changes += [f"{name} changes {what}" for what in after if after[what] != before[what]]
    before = after
last = attributes()
changes += [f"tracer replaces {'.'.join(key)}" for key in first if key in last and first[key] is not last[key]]
print(json.dumps({"changes": changes, "failures": failures, "modules": sorted(sys.modules)}))
"""


def third_party() -> list[str]:
    """Return the modules of others that a file of the product imports anywhere."""
    names = {
        target
        for source in PRODUCT.values()
        for node in ast.walk(ast.parse(source))
        for target in _targets(node)
        if target.split(".")[0] not in {"tracer", "__future__", *sys.stdlib_module_names}
    }
    return sorted(names)


def _targets(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and not node.level and node.module else []


def test_importing_any_module_changes_nothing():
    """No environment variable, no setting, and no function or class of another library."""
    result = run_fresh(TRIED, json.dumps([third_party(), MODULES]))
    assert result["failures"] == {}
    assert result["changes"] == []
    assert set(MODULES) <= set(result["modules"])
