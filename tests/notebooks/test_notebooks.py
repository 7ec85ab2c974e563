"""The notebooks keep their rules, take parameters, refuse mistyped ones; nbval compares their outputs."""

import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path

import papermill
import pytest
from helpers import execute, parameters, read_notebook

from lrpet.config import RunConfig
from lrpet.paths import PROJECT, results_root

PATHS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def test_notebooks_are_there():
    assert {"00_method", "01_cifar10", "08_tables"} <= {path.stem for path in PATHS}


@notebooks
def test_notebook_is_thin(path):
    notebook, code = read_notebook(path)
    lines = [len(cell.source.splitlines()) for cell in code]
    assert notebook.cells[0].cell_type == "markdown"
    assert len(code) <= 12
    assert sum(lines) <= 200
    assert max(lines) <= 40
    assert path.stat().st_size < 1_000_000


@notebooks
def test_notebook_runs_on_any_machine(path):
    notebook, _ = read_notebook(path)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/png", None)  # whose letters may be those of any place
    text = json.dumps(notebook)
    for place in (PROJECT, Path.home(), sys.prefix, tempfile.gettempdir()):
        assert f"{place}/" not in text


@notebooks
def test_links_lead_somewhere(path):
    notebook, _ = read_notebook(path)
    for cell in notebook.cells:
        for target in re.findall(r"\]\(([^)\s#]+)", cell.source) if cell.cell_type == "markdown" else ():
            assert "://" in target or target.startswith("attachment:") or (path.parent / target).exists(), (
                target
            )


@notebooks
def test_outputs_are_whole(path):
    _, code = read_notebook(path)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]


@notebooks
def test_parameters_are_literals_that_papermill_sees(path, monkeypatch):
    source, values = parameters(path)
    for line in source.splitlines():
        assert re.fullmatch(r"\w+: [^=]+ = .+  # \S.*", line), (
            f"{line!r} is not of the form 'name: type = value  # unit, source'"
        )
    # papermill overlooks an annotation with | in it: it warns that the right name is unknown
    monkeypatch.chdir(PROJECT)
    assert sorted(papermill.inspect_notebook(str(path))) == sorted(values)


def test_run_notebook_has_the_librarys_fields_and_defaults():
    _, values = parameters(PROJECT / "notebooks" / "01_cifar10.ipynb")
    assert (values.pop("data"), values.pop("device")) == (None, "auto")
    of_every_method = {field.name for field in dataclasses.fields(RunConfig) if field.default is not None}
    # a notebook is one process, and this one is about images and their classes
    of_every_method -= {"sync_batchnorm", "task", "pretrained_backbone"}
    assert of_every_method <= set(values) <= set(RunConfig().to_dict())
    assert RunConfig.from_dict(values) == RunConfig()


@pytest.mark.slow
def test_override_reaches_the_run(tmp_path):
    done, _ = execute(
        "01_cifar10", tmp_path, "{prune_ratio: 0.7, epochs: 1, seed: 5, batch_size: 256, milestones: []}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    config = RunConfig(prune_ratio=0.7, epochs=1, seed=5, batch_size=256, milestones=())
    assert (config.folder() / "summary.json").is_file()


@pytest.mark.slow
def test_a_field_that_only_another_method_reads_can_be_given(tmp_path):
    done, _ = execute(
        "01_cifar10",
        tmp_path,
        "{method: factorized, product_decay: false, epochs: 1, batch_size: 256, milestones: []}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    config = RunConfig(method="factorized", product_decay=False, epochs=1, batch_size=256, milestones=())
    assert (config.folder() / "summary.json").is_file()


@pytest.mark.slow
def test_mistyped_parameter_is_refused_before_training(tmp_path):
    done, _ = execute("01_cifar10", tmp_path, "prune_ration: 0.7")
    assert done.returncode == 1
    assert "did you mean 'prune_ratio'" in done.stdout
    log = (tmp_path / "01_cifar10.log").read_text().splitlines()
    (first,) = [i for i, line in enumerate(log) if line.startswith("refused: 'prune_ration' is not")]
    assert not [line for line in log[first + 1 :] if line.strip()]  # the last line, with no traceback of ours
    assert not [line for line in log if "lrpet/parameters.py" in line]
    assert not list(results_root().glob("**/config.json"))


@pytest.mark.slow
def test_tables_of_an_empty_store_say_so(tmp_path):
    done, out = execute("08_tables", tmp_path, "profile: smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not run" in out.read_text()


def test_the_gallery_has_a_line_for_each_notebook():
    text = (PROJECT / "notebooks" / "README.md").read_text(encoding="utf-8")
    for path in PATHS:
        assert f"[{path.stem}]({path.name})" in text
        assert (PROJECT / "notebooks" / "pictures" / f"{path.stem}.png").is_file()
