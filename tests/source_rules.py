"""Rules of the tree that are read from source text: who may import whom, sizes, names and words.

Every rule is a function of ``{path relative to the repository: source}`` and returns one message for each
breach, with file and line. tests/test_layout.py applies the rules to the repository, and to small sources that
break them.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

# A file may import from its own floor and from those before it in this list.
FLOORS = (
    "kernels",
    "library",
    "models",
    "data",
    "evaluation",
    "train",
    "demo",
    "cli",
    "benchmarks",
    "examples",
)
# The report stands beside the floors: it needs these files alone, and these floors alone need it.
REPORT_NEEDS = ("tracer.errors", "tracer.files", "tracer.words")
REPORT_USERS = ("report", "demo", "cli", "benchmarks", "examples")
ROOMS = (*FLOORS[2:7], "report")  # the folders of tracer/, besides kernels

# The only files that may import a heavy library, lazily or for the type checker too.
HOMES = {
    "triton": ["kernels/_triton.py"],
    "nvidia": ["tracer/data/dali.py"],
    "deepspeed": ["tracer/train/engine.py", "tracer/train/fake.py", "tracer/*zero*.py"],
    "open_clip": ["tracer/models/*.py", "tracer/demo/small_clip.py"],
    "torchmetrics": ["tracer/evaluation/*.py"],
    "resvg_py": ["tracer/demo/render.py"],
    "rich": ["tracer/report/*.py"],
    "jinja2": ["tracer/report/*.py"],
    "markupsafe": ["tracer/report/*.py"],
    "matplotlib": ["tracer/report/*.py"],
    "jsonargparse": ["tracer/cli.py"],
    "torchvision": ["tracer/data/decode.py"],
}
# What the flat files of tracer/ may import besides torch, the standard library and the project itself.
LIBRARY_EXTRAS = {
    "tracer/cli.py": {"jsonargparse", "docstring_parser", "yaml"},  # the others are part of the first
    "tracer/*zero*.py": {"deepspeed"},
    "tracer/files.py": {"safetensors"},  # whole files of weights
}

FILE_LINES, FUNCTION_LINES = 500, 70
REASON, REASON_LINES = "over 500 lines", 15
LAUNCHERS = ("kernels/contrastive_triton.py",)  # long lists of kernel arguments are clearer in one place

PHRASES = {
    r"\btheirs\b": "name whose it is",
    r"\bis\s+called\s+so\b": "say what the thing is",
    r"\bcannot\s+be\s+had\b": "say what is missing",
    r"\bis\s+no\s+(?:CSV|YAML|JSON|PNG|UTF)\b": "write 'is not a …'",
}
# Words that an identifier must not contain, and where. A name that is one word of several, like FileNotFoundError,
# is meant only where the word has no other sense.
PARTS_OF_NAMES = {"hit": ("kernels",), "hits": ("kernels",)}
WHOLE_NAMES = {
    "found": "name the thing",
    "teacher_scale": "teacher_logit_scale, without the temperature",
    "with_teacher": "teacher_output is what teacher.encode returned",
    "guide": "teacher_output is what teacher.encode returned",
    "KINDS": "ROLES or MERGE_RULES",
    "Drawing": "Icon or Figures",
}


class Import(NamedTuple):
    """An import of ``target`` (a dotted name) in line ``line`` of ``file``."""

    file: str
    line: int
    target: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: import of {self.target}"


def python_files(*folders: str) -> dict[str, str]:
    """Return path and source of every Python file in these folders (kernels/ once, not through its symlink)."""
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    names = {path.relative_to(ROOT).as_posix(): path for path in paths}
    return {name: path.read_text() for name, path in names.items() if not name.startswith("tracer/kernels/")}


def pages() -> dict[str, str]:
    """Return path and text of the pages that are written by hand."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for path in sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
    }


def module_of(file: str) -> str:
    """Return the dotted name under which a file is imported."""
    parts = file.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(["tracer", *parts] if parts[0] == "kernels" else parts)


def floor_of(module: str) -> str | None:
    """Return the floor of a module of ours, "report", or None for a module of others."""
    first, second = (*module.split("."), "")[:2]
    if first != "tracer":
        return first if first in FLOORS else None
    if second == "__main__":
        return "cli"
    return second if second in (*ROOMS, "kernels", "cli") else "library"


def imports(file: str, source: str, modules: Collection[str]) -> list[Import]:
    """Return every import of a file, wherever it stands.

    Imports inside functions and below ``if TYPE_CHECKING`` count, and so does a string that names one of
    ``modules`` or, in an f-string, begins with the name of a package: that is how a module is imported by name.
    """
    package = module_of(file) if file.endswith("/__init__.py") else module_of(file).rpartition(".")[0]
    targets: list[Import] = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute("." * node.level + (node.module or ""), package)
            whole = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in modules else base for name in whole]
        elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
            names = [
                _absolute(arg.value, package)
                for arg in node.args[:1]
                if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            ]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if "." in node.value and node.value in modules else []
        elif isinstance(node, ast.JoinedStr) and node.values and isinstance(node.values[0], ast.Constant):
            begin = re.fullmatch(r"(tracer(?:\.\w+)*)\.\w*", str(node.values[0].value))
            names = (
                [begin[1] if begin[1] != "tracer" else "tracer.cli"] if begin else []
            )  # any: take the highest
        targets += [Import(file, node.lineno, name) for name in names]  # type: ignore[attr-defined]
    return sorted(set(targets))


def _absolute(name: str, package: str) -> str:
    """Resolve leading dots against the package of the importing file."""
    rest = name.lstrip(".")
    dots = len(name) - len(rest)
    if not dots:
        return name
    parents = package.split(".")[: len(package.split(".")) - dots + 1]
    return ".".join([*parents, rest] if rest else parents)


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def all_imports(sources: Mapping[str, str]) -> list[Import]:
    """Return the imports of all files; modules are those of the files and the packages around them."""
    files = {module_of(file) for file in sources}
    modules = files | {module.rpartition(".")[0] for module in files} - {""}
    return [one for file, source in sources.items() for one in imports(file, source, modules)]


def upward_imports(sources: Mapping[str, str]) -> list[str]:
    """Return the imports that go to a higher floor, or that break the report's isolation."""
    return [message for one in all_imports(sources) if (message := _upward(one))]


def _upward(one: Import) -> str:
    mine, other = floor_of(module_of(one.file)), floor_of(one.target)
    if other is None or mine is None:
        return ""
    if mine == "report":
        allowed = other == "report" or one.target in REPORT_NEEDS
        return "" if allowed else f"{one}: report/ may import {' and '.join(REPORT_NEEDS)} alone"
    if other == "report":
        return "" if mine in REPORT_USERS else f"{one}: {mine} may not import the report"
    if FLOORS.index(other) > FLOORS.index(mine):
        return f"{one}: {mine} is below {other}"
    return ""


def import_circles(sources: Mapping[str, str]) -> list[str]:
    """Return one message for each group of files that import each other in a circle, with its imports."""
    files = {module_of(file): file for file in sources}
    edges = [
        (module_of(one.file), one.target, one)
        for one in all_imports(sources)
        if one.target in files and module_of(one.file) != one.target
    ]
    below: dict[str, set[str]] = {module: set() for module in files}
    for module, target, _ in edges:
        below[module].add(target)
    reach = {module: _reachable(module, below) for module in files}
    circles = {frozenset(m for m in reach[module] if module in reach[m]) for module in files}
    return [
        "circle: " + "; ".join(str(one) for module, target, one in edges if {module, target} <= circle)
        for circle in sorted(circles, key=sorted)
        if circle
    ]


def _reachable(start: str, below: Mapping[str, set[str]]) -> set[str]:
    """Return what ``start`` imports, directly or not; ``start`` itself is in it only when on a circle."""
    visited: set[str] = set()
    waiting = list(below[start])
    while waiting:
        module = waiting.pop()
        if module not in visited:
            visited.add(module)
            waiting += below[module]
    return visited


def strays_from_home(sources: Mapping[str, str]) -> list[str]:
    """Return the imports of heavy libraries outside the files that HOMES lists for them."""
    return [
        f"{one}: only {HOMES[library] or 'nobody'} may"
        for one in all_imports(sources)
        if (library := one.target.split(".")[0]) in HOMES
        and not any(fnmatch(one.file, home) for home in HOMES[library])
    ]


def library_extras(sources: Mapping[str, str]) -> list[str]:
    """Return the imports by kernels and library of anything but torch, the standard library and the project."""
    messages = []
    for one in all_imports(sources):
        floor, root = floor_of(module_of(one.file)), one.target.split(".")[0]
        if floor not in ("kernels", "library", "cli"):
            continue
        allowed = {"torch", "tracer", *sys.stdlib_module_names}
        if floor == "kernels":
            allowed.add("triton")  # HOMES says in which file
        for pattern, extra in LIBRARY_EXTRAS.items():
            allowed |= extra if fnmatch(one.file, pattern) and one.file.count("/") == 1 else set()
        if root not in allowed:
            messages.append(f"{one}: {floor} knows torch and the standard library alone")
    return messages


def long_files(sources: Mapping[str, str]) -> list[str]:
    """Return the files over FILE_LINES lines whose first lines give no reason for it."""
    sizes = {file: source.count("\n") for file, source in sources.items()}
    return [
        f"{file}: {size} lines; a reason belongs in its first {REASON_LINES} lines, with the words '{REASON}'"
        for file, size in sizes.items()
        if size > FILE_LINES and REASON not in " ".join(sources[file].splitlines()[:REASON_LINES])
    ]


def long_functions(sources: Mapping[str, str]) -> list[str]:
    """Return the functions over FUNCTION_LINES lines, docstrings not counted.

    Kernels (anything decorated with a ``jit``) and the files of LAUNCHERS are exempt.
    """
    messages = []
    for file, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or file in LAUNCHERS:
                continue
            if file.startswith("kernels/") and any(_decorator(x) == "jit" for x in node.decorator_list):
                continue
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                size -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if size > FUNCTION_LINES:
                messages.append(f"{file}:{node.lineno}: {node.name} has {size} lines")
    return messages


def _decorator(node: ast.expr) -> str:
    return _last_name(node.func if isinstance(node, ast.Call) else node)


def banned_phrases(texts: Mapping[str, str]) -> list[str]:
    """Return the banned phrases in pages, and in the comments and strings of Python files."""
    return [
        f"{file}:{line + text[: match.start()].count(chr(10))}: '{match[0]}': {advice}"
        for file, source in texts.items()
        for line, text in (_prose(source) if file.endswith(".py") else [(1, source)])
        for phrase, advice in PHRASES.items()
        for match in re.finditer(phrase, text, re.IGNORECASE)
    ]


def _prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield first line and text of every comment and string."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds:
            yield token.start[0], token.string


def banned_names(sources: Mapping[str, str]) -> list[str]:
    """Return the uses of identifiers that PARTS_OF_NAMES and WHOLE_NAMES ban."""
    messages = []
    for file, source in sources.items():
        parts = {part for part, folders in PARTS_OF_NAMES.items() if file.split("/")[0] in folders}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type != tokenize.NAME:
                continue
            name, where = token.string, f"{file}:{token.start[0]}"
            if name in WHOLE_NAMES:
                messages.append(f"{where}: {name}: {WHOLE_NAMES[name]}")
            elif used := parts & set(re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().split("_")):
                messages.append(f"{where}: {name}: say what a '{min(used)}' is")
    return messages
