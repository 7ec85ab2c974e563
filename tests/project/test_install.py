"""One list of dependencies: pyproject.toml, requirements.lock and environment.yml agree; .venv has it."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from lrpet.paths import PROJECT

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
PROJECT_TABLE = PYPROJECT["project"]
OPTIONAL = PROJECT_TABLE["optional-dependencies"]
NOT_LOCKED = ("deploy", "segmentation")  # a newcomer needs none of them
GROUPS = (
    PYPROJECT["build-system"]["requires"],
    PROJECT_TABLE["dependencies"],
    *(packages for extra, packages in OPTIONAL.items() if extra not in NOT_LOCKED),
)
DECLARED = [Requirement(text) for group in GROUPS for text in group]
BESIDE = [Requirement(text) for name in NOT_LOCKED for text in OPTIONAL[name]]
LOCK, ZOO = (
    [
        Requirement(line)
        for line in (PROJECT / name).read_text().splitlines()
        if line and not line.startswith("#")
    ]
    for name in ("requirements.lock", "requirements-zoo.lock")
)


def test_locks_hold_exact_versions_and_no_addresses():
    for requirement in LOCK + ZOO:
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement
        assert requirement.url is None
    assert all("://" not in file.read_text() for file in PROJECT.glob("*.lock"))


def test_a_newcomer_gets_nothing_of_other_peoples_libraries():
    assert not {requirement.name for requirement in LOCK + DECLARED} & {other.name for other in ZOO}


@pytest.mark.parametrize("declared", DECLARED, ids=str)
def test_lock_satisfies_every_declared_dependency(declared):
    locked = [next(iter(r.specifier)).version for r in LOCK if r.name == declared.name]
    assert locked, f"{declared} is not in requirements.lock; its first lines say how to make it anew"
    assert all(declared.specifier.contains(version) for version in locked)


UNBOUNDED = {
    "setuptools": "builds the wheel alone, in a place of its own, and has a new major version every few weeks"
}


@pytest.mark.parametrize("declared", DECLARED, ids=str)
def test_each_dependency_ends_before_the_major_version_after_the_locked_one(declared):
    """A newer major version may take away what is used here; it is let in once it has been tried."""
    bounds = {specifier.operator: Version(specifier.version) for specifier in declared.specifier}
    assert ">=" in bounds
    if declared.name in UNBOUNDED:
        assert set(bounds) == {">="} and UNBOUNDED[declared.name]
        return
    locked = max(Version(next(iter(r.specifier)).version) for r in LOCK if r.name == declared.name)
    assert bounds["<"] == Version(str(locked.major + 1))


def test_every_import_is_declared():
    imported, integrations = set(), PROJECT / "lrpet" / "deploy" / "integrations.py"
    for path in {*(PROJECT / "lrpet").rglob("*.py")} - {integrations}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    known, declared = packages_distributions(), {requirement.name for requirement in DECLARED + BESIDE}
    for name in imported - sys.stdlib_module_names - {"lrpet"}:
        assert {found.lower().replace("_", "-") for found in known.get(name, [name])} & declared, (
            f"lrpet imports {name}; pyproject.toml does not name it"
        )


def test_libraries_that_users_bring_are_imported_when_asked_for_and_tried_by_all_tests():
    tree = ast.parse((PROJECT / "lrpet" / "deploy" / "integrations.py").read_text())
    brought = {requirement.name.replace("-", "_") for requirement in ZOO}
    known = {name.replace("-", "_") for name in {requirement.name for requirement in DECLARED}}
    here = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            name = module.split(".")[0]
            if name not in sys.stdlib_module_names | known | {"lrpet"}:
                assert name in brought and node not in here, name


def test_conda_environment_agrees():
    *packages, pip = yaml.safe_load((PROJECT / "environment.yml").read_text())["dependencies"]
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}
    python = next(package.removeprefix("python=") for package in packages if package.startswith("python="))
    assert SpecifierSet(PROJECT_TABLE["requires-python"]).contains(python)


def test_setup_looks_for_the_pythons_that_are_allowed():
    allowed = SpecifierSet(PROJECT_TABLE["requires-python"])
    script = (PROJECT / "scripts" / "environment.sh").read_text()
    for version in (f"3.{minor}" for minor in range(8, 20)):
        assert (f"{version}.*" in script) == allowed.contains(version)


# A python that makes environments out of itself and notes what it was asked to install, which it does not.
STAND_IN = """#!/bin/bash
case "$*" in
    *version_info*) echo "${VERSION:-3.11.9}" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/made" ;;
    "-m pip "*) echo "${@: -1}" >>"$INSTALLED"; [ -z "${FAIL:-}" ] || kill -9 $PPID
        [ -z "${REFUSE:-}" ] ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """Return a function that sets up an environment in a project of two files, and what it installed."""
    root = tmp_path / "a project"
    root.mkdir()
    (root / "requirements.lock").write_text("numpy==2.0\n")
    (root / "requirements-zoo.lock").write_text("timm==1.0\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "cmp", "cp", "head", "mkdir", "mv", "rm", "touch"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3.11").write_text(STAND_IN)
    (tools / "python3.11").chmod(0o755)

    def start(then="echo uses $PYTHON", **environment):
        note = tmp_path / "installed"
        note.write_text("")
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("LRPET_", "PYTHON"))
        }
        done = subprocess.run(
            [
                shutil.which("bash"),
                "-c",
                f'set -euo pipefail; ROOT=$1; . "{PROJECT}/scripts/environment.sh"; {then}',
                "-",
                str(root),
            ],
            env={**clean, "PATH": str(tools), "INSTALLED": str(note), **environment},
            capture_output=True,
            text=True,
        )
        done.installed = note.read_text().split("\n")[:-1]
        return done

    start.root, start.tools = root, tools
    return start


def test_environment_is_made_once(setup):
    first = setup()
    assert first.returncode == 0, first.stderr
    assert f"uses {setup.root}/.venv/bin/python" in first.stdout
    assert first.installed == [str(setup.root / "requirements.lock"), str(setup.root)]
    assert setup().installed == []


def test_other_peoples_libraries_are_installed_once_and_beside_the_environment(setup):
    setup()
    assert setup("add_zoo").installed == [str(setup.root / "requirements-zoo.lock")]
    assert setup("add_zoo").installed == []
    (setup.root / "requirements-zoo.lock").write_text("timm==1.1\n")
    shown = setup('add_zoo; echo "finds $PYTHONPATH"')
    assert len(shown.installed) == 1 and f"finds {setup.root}/.venv/zoo" in shown.stdout


def test_without_other_peoples_libraries_the_tests_go_on(setup):
    setup()
    without = setup("add_zoo", REFUSE="yes")
    assert without.returncode == 0 and "is skipped" in without.stderr
    assert len(setup("add_zoo").installed) == 1


def test_changed_lock_is_installed_into_the_environment_that_is_there(setup):
    setup()
    (setup.root / "requirements.lock").write_text("numpy==2.1\n")
    (setup.root / ".venv" / "made").unlink()
    assert len(setup().installed) == 2
    assert not (setup.root / ".venv" / "made").exists()


def test_interrupted_installation_is_not_taken_for_whole(setup):
    assert setup(FAIL="yes").returncode != 0
    (setup.root / ".venv" / "half").touch()
    again = setup()
    assert again.returncode == 0 and len(again.installed) == 2
    assert not (setup.root / ".venv" / "half").exists()


def test_moved_environment_is_made_anew(setup):
    setup()
    stamp = setup.root / ".venv" / "stamp"
    stamp.write_text("/elsewhere\n" + stamp.read_text().split("\n", 1)[1])
    (setup.root / ".venv" / "made").unlink()
    assert len(setup().installed) == 2
    assert (setup.root / ".venv" / "made").exists()


def test_missing_python_is_named(setup):
    refused = setup(VERSION="3.10.2")
    assert refused.returncode == 1
    assert "Python 3.11, 3.12 or 3.13" in refused.stderr and "python3.11 is 3.10.2" in refused.stderr
    assert not (setup.root / ".venv").exists()


def test_given_python_is_used_as_it_is(setup):
    given = str(setup.tools / "python3.11")
    assert f"uses {given}" in setup(LRPET_PYTHON=given).stdout
    assert setup(LRPET_PYTHON=given).installed == []
    refused = setup(LRPET_PYTHON=str(setup.root / "none"))
    assert refused.returncode == 1 and "does not run" in refused.stderr


# A python that says which module it was to run, and is a real one otherwise.
LISTENER = f"""#!/bin/bash
case "$*" in "-m "*) echo "called $*" ;; *) exec "{sys.executable}" "$@" ;; esac
"""


@pytest.mark.parametrize(
    ("command", "chosen", "notebooks"),
    [
        (["run_tests.sh"], "-m not slow", False),
        (["run_tests.sh", "-k", "projection"], "-k projection", False),
        (["run_tests.sh", "--all"], "", True),
        ([".ci/run"], "", True),
    ],
)
def test_which_tests_a_command_runs(tmp_path, command, chosen, notebooks):
    python, (script, *arguments) = tmp_path / "python", command
    python.write_text(LISTENER)
    python.chmod(0o755)
    environment = {**os.environ, "LRPET_PYTHON": str(python)}
    done = subprocess.run([PROJECT / script, *arguments], env=environment, capture_output=True, text=True)
    called = [line for line in done.stdout.splitlines() if line.startswith("called -m pytest")]
    assert called[0].endswith(f"loadscope {chosen}".strip())
    assert [line for line in called if "notebooks/08_tables.ipynb" in line] == called[1:]
    assert bool(called[1:]) == notebooks
