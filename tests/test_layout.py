"""The tree's rules (docs/architecture.md): direction of imports, homes of libraries, sizes, names and words."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import source_rules as rules

CODE = rules.python_files("kernels", "tracer", "benchmarks", "examples")
PRODUCT = {file: source for file, source in CODE.items() if file.startswith(("kernels/", "tracer/"))}
EVERYTHING = {**CODE, **rules.python_files("tests"), "setup.py": (rules.ROOT / "setup.py").read_text()}
NAMERS = ("tests/source_rules.py", "tests/test_layout.py")  # they write the banned words down


def fail_with(messages: Sequence[str]) -> None:
    """Fail with one line for each breach."""
    if messages:
        pytest.fail("\n".join([f"{len(messages)} in all", *messages]), pytrace=False)


def test_every_folder_has_a_floor():
    folders = {file.split("/")[1] for file in PRODUCT if file.startswith("tracer/") and file.count("/") > 1}
    assert folders == set(rules.ROOMS)
    assert all(file.count("/") == 1 for file in PRODUCT if file.startswith("kernels/"))


def test_the_tests_mirror_the_code():
    folders = {file.split("/")[1] for file in EVERYTHING if file.startswith("tests/") and file.count("/") > 1}
    assert folders <= {*rules.ROOMS, "kernels", "benchmarks", "inputs"}


def test_imports_go_downwards():
    fail_with(rules.upward_imports(CODE))


def test_no_files_import_each_other_in_a_circle():
    fail_with(rules.import_circles(CODE))


def test_heavy_libraries_are_imported_by_the_files_that_need_them():
    fail_with(rules.strays_from_home(PRODUCT))


def test_kernels_and_library_know_torch_alone():
    fail_with(rules.library_extras(PRODUCT))


def test_long_files_say_why():
    fail_with(rules.long_files(EVERYTHING))


def test_functions_fit_on_a_screen():
    fail_with(rules.long_functions(EVERYTHING))


def test_no_banned_phrase():
    texts = {**EVERYTHING, **rules.pages()}
    fail_with(rules.banned_phrases({file: text for file, text in texts.items() if file not in NAMERS}))


def test_no_banned_name():
    fail_with(rules.banned_names(CODE))


# Each rule can fail: the sources below break it, or come close and do not.

OPS, TEACHER, INDEX, LOOP = (
    "tracer/ops.py",
    "tracer/teacher.py",
    "tracer/data/index.py",
    "tracer/train/loop.py",
)
LAZY = "def load():\n    from tracer.train.loop import step\n"
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tracer.data.index\n"
BY_NAME = "import importlib\nx = importlib.import_module('tracer.train.loop')\n"
IN_TABLE = "MODULES = {'loop': 'tracer.train.loop'}\n"
PACKAGE_BY_NAME = "import importlib\nx = importlib.import_module(f'tracer.data.{name}')\n"
ANY_BY_NAME = "import importlib\nx = importlib.import_module(f'tracer.{name}')\n"
RELATIVE_BY_NAME = "import importlib\nx = importlib.import_module('.train.loop', __package__)\n"


@pytest.mark.parametrize(
    ("file", "source", "line", "target"),
    [
        pytest.param(INDEX, "from tracer.train.loop import step\n", 1, "tracer.train.loop", id="plain"),
        pytest.param(OPS, "import torch, tracer.data.index\n", 1, "tracer.data.index", id="second name"),
        pytest.param(INDEX, LAZY, 2, "tracer.train.loop", id="inside a function"),
        pytest.param(OPS, TYPES, 3, "tracer.data.index", id="for the type checker"),
        pytest.param(OPS, BY_NAME, 2, "tracer.train.loop", id="by name"),
        pytest.param(OPS, IN_TABLE, 1, "tracer.train.loop", id="by name from a table"),
        pytest.param(OPS, PACKAGE_BY_NAME, 2, "tracer.data", id="package by name"),
        pytest.param(INDEX, ANY_BY_NAME, 2, "tracer.cli", id="anything by name"),
        pytest.param(OPS, RELATIVE_BY_NAME, 2, "tracer.train.loop", id="by relative name"),
        pytest.param(INDEX, "from ..train import loop\n", 1, "tracer.train.loop", id="relative"),
        pytest.param(OPS, "from tracer import data\n", 1, "tracer.data", id="package"),
        pytest.param(OPS, "from tracer import cli\n", 1, "tracer.cli", id="command line"),
        pytest.param("kernels/_grid.py", "from tracer.ops import x\n", 1, "tracer.ops", id="out of kernels"),
        pytest.param(LOOP, "from tracer.report import page\n", 1, "tracer.report.page", id="to the report"),
        pytest.param("tracer/report/page.py", "import tracer.ops\n", 1, "tracer.ops", id="out of the report"),
        pytest.param(LOOP, "from benchmarks import step\n", 1, "benchmarks", id="to the benchmarks"),
    ],
)
def test_an_upward_import_is_reported(file, source, line, target):
    others = {OPS: "", INDEX: "", LOOP: "", "tracer/cli.py": "", "tracer/report/page.py": ""}
    (message,) = rules.upward_imports({**others, file: source})
    assert message.startswith(f"{file}:{line}: import of {target}: ")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        pytest.param(LOOP, "from tracer.data.index import Index\n", id="downwards"),
        pytest.param(LOOP, "import torch, deepspeed\nfrom . import log\n", id="others, and the same floor"),
        pytest.param(
            OPS, "import importlib\nimportlib.import_module(f'tracer.kernels.{x}')\n", id="kernels by name"
        ),
        pytest.param(OPS, "raise ValueError(f'tracer.train is {x}')\n", id="words in a message"),
        pytest.param(OPS, "'''See tracer.train.loop for the loop.'''\n", id="words in a docstring"),
        pytest.param(
            "tracer/report/page.py", "from tracer import errors, files\n", id="what the report needs"
        ),
        pytest.param("tracer/demo/compare.py", "import tracer.report.page\n", id="demo to report"),
        pytest.param(
            "benchmarks/plots.py", "import tracer.report.page, tracer.cli\n", id="benchmarks to all"
        ),
    ],
)
def test_a_downward_import_is_allowed(file, source):
    others = dict.fromkeys(("tracer/errors.py", "tracer/files.py", INDEX, LOOP, "tracer/report/page.py"), "")
    assert rules.upward_imports({**others, file: source}) == []


def test_a_circle_is_reported_with_its_imports():
    sources = {
        TEACHER: "def build():\n    from tracer import _average\n",
        "tracer/_average.py": "from tracer.schedules import EMA\n",
        "tracer/schedules.py": "import tracer.teacher\n",
        OPS: "import tracer.teacher\n",
    }
    assert rules.import_circles({**sources, "tracer/schedules.py": ""}) == []
    (message,) = rules.import_circles(sources)
    assert "tracer/teacher.py:2: import of tracer._average" in message
    assert "tracer/schedules.py:1: import of tracer.teacher" in message
    assert "ops.py" not in message


def test_a_heavy_import_outside_its_home_is_reported():
    lazy = "def start():\n    import nvidia.dali.fn\n"
    assert rules.strays_from_home({"tracer/data/dali.py": lazy}) == []
    assert len(rules.strays_from_home({INDEX: lazy})) == 1
    assert len(rules.library_extras({OPS: "import numpy\n", "tracer/models/clip.py": "import numpy\n"})) == 1


def test_a_long_file_or_function_is_reported():
    short, long = "x = 1\n" * 499, "x = 1\n" * 501
    reason = '"""One table.\n\nThe file is over 500 lines because it is one table.\n"""\n'
    assert rules.long_files({OPS: short, TEACHER: reason + long}) == []
    assert len(rules.long_files({OPS: long})) == 1
    body = "    x = 1\n" * 70
    function, doc = f"def f():\n{body}", '    """Do it."""\n'
    assert rules.long_functions({"kernels/a.py": f"@triton.jit\n{function}", OPS: function[:-10]}) == []
    assert rules.long_functions({OPS: f"def f():\n{doc}{body[:-10]}"}) == []
    assert len(rules.long_functions({OPS: function, TEACHER: f"@triton.jit\n{function}"})) == 2


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("# ours and theirs\n", 1),
        ("x = f'{path} is no CSV'\n", 1),
        ("'''It is called\n    so.'''\n", 1),
        ("theirs = 1\n", 0),
        ("# is no option\n", 0),
    ],
)
def test_a_banned_phrase_is_reported(text, count):
    assert len(rules.banned_phrases({OPS: text})) == count


@pytest.mark.parametrize(
    ("file", "source", "count"),
    [
        ("kernels/_grid.py", "hit = at_hits[_Hits]\n", 3),
        ("kernels/_grid.py", "'hit'; white = whitespace  # hit\n", 0),
        (OPS, "cache_hit = found\n", 1),
        (OPS, "except FileNotFoundError: not_found = 1\n", 0),
    ],
)
def test_a_banned_name_is_reported(file, source, count):
    assert len(rules.banned_names({file: source})) == count
