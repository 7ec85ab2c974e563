"""The notebooks, executed with parameters that are not their defaults, say the same when run again."""

import os
import shutil
import subprocess
import sys

import nbformat
import pytest
import yaml
from helpers import TINY
from helpers import parameters as notebook_parameters

from lrpet import RunConfig, run
from lrpet.data.digits_tree import make_digits_tree
from lrpet.experiments import load_profile
from lrpet.paths import PROJECT

IMAGES = {
    "dataset": "imagefolder",
    "model": "resnet8",
    "image_size": 16,
    "crops": "whole",
    "epochs": 1,
    "milestones": [],
    "batch_size": 64,
}
DIGITS = {"dataset": "digits", "profile": "smoke", "batch_size": 256, "validation_fraction": 0.2}
SETS = {  # notebook, parameters; each once as it comes and once with much changed
    "a short run": ("01_cifar10", {**TINY, "milestones": [1], "seed": 3}),
    "another method": (
        "01_cifar10",
        {
            **TINY,
            "milestones": [1],
            "method": "lrp",
            "prune_ratio": 0.7,
            "projection_unit": "iteration",
            "recipe": "adamw",
        },
    ),
    "larger images": ("02_imagenet", IMAGES | {"method": "lrp"}),
    "larger images, square crops": (
        "02_imagenet",
        IMAGES | {"crops": "square", "seed": 2, "prune_ratio": 0.7},
    ),
    "ablations of smoke": ("03_ablations", {"profile": "smoke"}),
    "ablations of short": ("03_ablations", {"profile": "short"}),
    "spectra": ("04_singular_values", {"profile": "short", "seed": 2, "methods": ["lrp", "lrpet"]}),
    "spectra of one method": (
        "04_singular_values",
        {"profile": "short", "seed": 2, "methods": ["lrpet"], "layers_shown": 2},
    ),
    "gradients": (
        "05_gradient_norms",
        {"profile": "short", "seed": 2, "methods": ["lrp", "lrpet"], "draws": 2},
    ),
    "gradients with a plain network": ("05_gradient_norms", {"draws": 1, "prune_ratio": 0.7}),
    "a small search": (
        "06_rank_search",
        {**DIGITS, "trials": 4, "search_epochs": 1, "final_epochs": 2},
    ),
    "a search a layer": (
        "06_rank_search",
        {**DIGITS, "trials": 2, "search_epochs": 1, "final_epochs": 1, "per_layer": True, "seed": 2},
    ),
    "speed": ("07_speed", {}),
    "speed of another network": ("07_speed", {"model": "resnet20"}),
    "tables of smoke": ("08_tables", {"profile": "smoke"}),
    "tables of short": ("08_tables", {"profile": "short"}),
    "a report of smoke": ("09_report", {"profile": "smoke"}),
    "a report of short": ("09_report", {"profile": "short"}),
    "boxes": ("11_detection_segmentation", {"task": "detection", "images": 2, "score": 0.3}),
    "masks": ("11_detection_segmentation", {"task": "segmentation"}),
}


@pytest.fixture(autouse=True)
def committed_results(monkeypatch, tmp_path):
    """A copy of the results that came with the repository, to which a notebook may add."""
    shutil.copytree(PROJECT / "results", tmp_path / "results", ignore=lambda _, names: {"smoke"} & set(names))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters"), SETS.values(), ids=SETS)
def test_papermill_then_nbval_strict(tmp_path, name, parameters):
    """The second execution loads what the first has trained: all else must be the same, seconds included."""
    if name == "01_cifar10":  # which says whether it has trained or loaded
        run(RunConfig.from_dict(parameters), device="cpu", progress="off")
    if name == "02_imagenet":
        _, defaults = notebook_parameters(PROJECT / "notebooks" / f"{name}.ipynb")
        fields = {
            key: value for key, value in (defaults | parameters).items() if key not in ("data", "device")
        }
        run(RunConfig.from_dict(fields), data=make_digits_tree(), device="cpu", progress="off")
    if name == "11_detection_segmentation":
        for experiment in load_profile("smoke").experiments:
            if experiment.config.task == parameters["task"]:
                run(experiment.config, device="cpu", progress="off")
    environment = {**os.environ, "JUPYTER_PREFER_ENV_PATH": "1", "PYTHONPATH": str(PROJECT)}
    executed = tmp_path / f"{name}.ipynb"
    command = [
        "papermill",
        PROJECT / "notebooks" / f"{name}.ipynb",
        executed,
        "--kernel",
        "python3",
        "--no-progress-bar",
    ]
    made = subprocess.run(
        [sys.executable, "-m", *command, "-y", yaml.safe_dump(parameters)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    cells = [cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) > 3  # there is something to compare
    nbval = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-current-env",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
        "-c",
        os.devnull,
        executed,
    ]
    again = subprocess.run(nbval, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout
    assert f"{len(cells)} passed" in again.stdout


@pytest.mark.slow
def test_nbval_finds_an_output_that_changed(tmp_path):
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    )
    notebook.cells = [
        nbformat.v4.new_code_cell(
            "1 + 1",
            execution_count=1,
            outputs=[nbformat.v4.new_output("execute_result", {"text/plain": "3"}, execution_count=1)],
        )
    ]
    nbformat.write(notebook, tmp_path / "wrong.ipynb")
    nbval = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-current-env",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        tmp_path / "wrong.ipynb",
    ]
    assert subprocess.run(nbval, cwd=tmp_path, capture_output=True, text=True).returncode == 1
