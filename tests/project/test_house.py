"""The shape of the house: imports run downward, `import lrpet` is light, functions and classes stay short."""

import ast
import json
import subprocess
import sys

import pytest

from lrpet.paths import PROJECT

PACKAGE = PROJECT / "lrpet"
ORDER = (  # a row may import the rows below it, and nothing of its own row but itself
    "__init__ __main__ explore gradients",
    "figures",
    "tables",
    "bench",
    "runs",
    "deploy training",
    "methods",
    "data lowrank models",
)
GROUND = {"registry", "config", "paths", "files", "processes", "experiments", "parameters"}
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names.split()}
ONLY = {"lowrank": {"lowrank", "files"}, "models": {"models"}}  # the library: torch, and files written whole
HEAVY = {"pandas", "PIL", "filelock", "sklearn", "matplotlib", "yaml", "torchvision"}
FILES = sorted(PACKAGE.rglob("*.py"))
PARSED = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def part(name):
    """Return the wing or file of the ground that a module belongs to: ``lrpet.data.sets`` is of ``data``."""
    return (*name.split("."), "__init__")[1]


def imported(tree):
    """Return the parts of lrpet that a module imports anywhere, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import hides which wing it reaches"
            below = {f"lrpet.{alias.name}" for alias in node.names if alias.name in LEVEL.keys() | GROUND}
            names = (node.module == "lrpet" and below) or [node.module]
        else:
            continue
        yield from ((part(name), node.lineno) for name in names if name.split(".")[0] == "lrpet")


def may_import(own, other):
    if own in GROUND:
        return other in GROUND
    if own in ONLY:
        return other in ONLY[own]
    return other == own or other in GROUND or LEVEL[other] > LEVEL[own]


@pytest.mark.parametrize("own", [*LEVEL, *sorted(GROUND)])
def test_imports_run_downward(own):
    upward = [
        f"{file.relative_to(PACKAGE)}:{line} imports {other}"
        for file in FILES
        if file.relative_to(PACKAGE).parts[0].removesuffix(".py") == own
        for other, line in imported(PARSED[file])
        if not may_import(own, other)
    ]
    assert upward == []


def test_every_file_has_its_place():
    assert {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES} <= LEVEL.keys() | GROUND


def test_the_library_loads_alone():
    asked = "import json, sys, lrpet; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", asked], capture_output=True, check=True).stdout)
    assert HEAVY.isdisjoint(loaded)
    ours = {part(name) for name in loaded if name.split(".")[0] == "lrpet"}
    assert ours <= {"__init__", "lowrank", "models", "files"}


def longer(kind, lines):
    """Return the definitions whose body, docstring apart, has more than so many lines."""
    for file, tree in PARSED.items():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                first = node.body[ast.get_docstring(node) is not None :][:1] or [node]
                length = node.end_lineno - first[0].lineno + 1
                if length > lines:
                    yield f"{file.relative_to(PACKAGE)}:{node.lineno} {node.name}: {length} lines"


def test_functions_and_classes_are_short():
    loop = ("training/loop.py", "train:")  # the one that may be longer
    long = [text for text in longer(ast.FunctionDef, 60) if not all(word in text for word in loop)]
    assert long == []
    assert list(longer(ast.ClassDef, 200)) == []
