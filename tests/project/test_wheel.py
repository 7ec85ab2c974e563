"""The library from a wheel, away from a checkout: README's example runs; what needs the checkout says so."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lrpet.paths import PROJECT

pytestmark = pytest.mark.slow
EXAMPLE = """
import lrpet, torch
model, epochs, optimizer, loader = lrpet.build_model("resnet8"), 2, None, None
train_one_epoch = lambda *given: None
{readme}
x = torch.randn(2, 3, 32, 32)
torch.testing.assert_close(compact.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-4)
print(lrpet.__file__)
"""
REFUSED = """
from lrpet import RunConfig, load_runs, run, tables
from lrpet.data.sets import load_data
from lrpet.experiments import load_profile
from lrpet.figures import saved_figures
asked = {
    "experiments.yaml": lambda: load_profile("smoke"),
    "paper/reported.csv": tables.published,
    "docs/evidence.md": tables.write_pages,
    "figures/README.md": lambda: saved_figures("smoke"),
    "data/cifar10": lambda: load_data(RunConfig(dataset="cifar10")),
    "results": lambda: run(RunConfig(), progress="off"),
}
for name, ask in asked.items():
    try:
        ask()
    except ValueError as error:
        assert str(error).startswith(f"{name} belongs to a checkout of the project"), error
        print(error)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a function that runs Python where only an installed lrpet can be imported, and its folder."""
    place = tmp_path_factory.mktemp("wheel")
    source, target = place / "source", place / "target"
    shutil.copytree(PROJECT / "lrpet", source / "lrpet", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", place, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = place.glob("lrpet-*.whl")
    shutil.rmtree(source)
    install = [*pip, "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run(install, check=True, capture_output=True)

    def script(*arguments, **places):
        clean = {name: os.environ[name] for name in os.environ if not name.startswith(("LRPET_", "PYTHON"))}
        return subprocess.run(
            [sys.executable, "-P", "-B", *arguments],
            cwd=place,
            env={**clean, "PYTHONPATH": str(target), **places},
            capture_output=True,
            text=True,
        )

    before = sorted(target.rglob("*"))
    yield script, target
    assert sorted(target.rglob("*")) == before  # nothing was written into its folder


def test_the_example_of_the_readme_runs(installed):
    script, target = installed
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    (readme,) = re.findall(r"## Three lines in your own loop\n\n```python\n(.*?)```", text, re.DOTALL)
    done = script("-c", EXAMPLE.format(readme=readme))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(target / "lrpet" / "__init__.py")


def test_what_needs_the_checkout_says_so_in_one_sentence(installed):
    script, target = installed
    done = script("-c", REFUSED)
    assert done.returncode == 0, done.stderr
    refusals = done.stdout.splitlines()
    assert len(refusals) == 6 and all(str(target) in line for line in refusals)
    assert "set LRPET_RESULTS or give results=" in refusals[-1]
    for verb, needed in (("check", "experiments.yaml"), ("tables", "docs/evidence.md")):
        asked = script("-m", "lrpet", verb)
        assert asked.returncode == 1
        (line,) = asked.stderr.splitlines()
        assert line.startswith(f"error: {needed} belongs to a checkout of the project")


def test_a_run_is_trained_and_exported_where_its_folder_is_named(installed, tmp_path):
    script, _ = installed
    short = ("epochs=1", "milestones=[]", "batch_size=648", "--device", "cpu")
    trained = script("-m", "lrpet", "train", *short, LRPET_RESULTS=str(tmp_path / "results"))
    assert trained.returncode == 0, trained.stderr
    folder = trained.stdout.splitlines()[-1].partition("all files: ")[2]
    assert json.loads((Path(folder) / "environment.json").read_text())["commit"] == "unknown"
    file = tmp_path / "net.safetensors"
    exported = script("-m", "lrpet", "export", folder, "--to", "safetensors", "--out", str(file))
    assert exported.returncode == 0, exported.stderr
    assert file.is_file()
