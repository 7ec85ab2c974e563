"""run_all.sh and the Snakefile: what is planned, what stops them, and that exit status 0 means complete."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import yaml

from lrpet.experiments import load_profile
from lrpet.paths import PROJECT

READERS = ("03_ablations", "04_singular_values", "05_gradient_norms", "08_tables", "09_report")  # of runs
PROFILES = list(yaml.safe_load((PROJECT / "experiments.yaml").read_text()))


def run_all(*arguments, root=PROJECT, **environment):
    return subprocess.run(
        [root / "run_all.sh", *arguments],
        cwd="/",  # from any folder
        env={**os.environ, "LRPET_PYTHON": sys.executable, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "profile", [pytest.param(name, marks=[pytest.mark.slow] if name != "smoke" else []) for name in PROFILES]
)
def test_dry_run_plans_every_run(profile, tmp_path):
    planned = run_all("--profile", profile, "--dry-run", LRPET_DATA=str(tmp_path))
    assert planned.returncode == 0, planned.stderr
    jobs = {
        line.split()[0]
        for line in planned.stdout.splitlines()
        if line.split()[1:] == ["1"] or line.startswith(("alone ", "store "))
    }
    runs = {e.config.run_id: e.name for e in reversed(load_profile(profile).experiments)}
    assert jobs - {"alone", "store"} == {*runs.values(), "all"}
    assert load_profile(profile).cost in planned.stdout
    assert not os.path.exists(os.environ["LRPET_RESULTS"])


@pytest.mark.slow
def test_a_results_folder_may_have_any_name_but_braces(tmp_path):
    named = run_all("--dry-run", LRPET_RESULTS=str(tmp_path / "a b'ü\"$x"))
    assert named.returncode == 0, named.stderr
    braces = run_all("--dry-run", LRPET_RESULTS=str(tmp_path / "{x}"))
    assert braces.returncode == 2 and "must have no braces in its path" in braces.stderr


TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 4 -m lrpet run resnet18-lrpet-s1 "


@pytest.mark.parametrize(("gpus", "launch"), [("1", "02_imagenet.ipynb"), ("4", TORCHRUN)])
def test_a_run_on_several_gpus_is_a_process_on_each(gpus, launch):
    options = f"--dry-run --printshellcmds --cores 1 --resources gpu={gpus}"
    settings = ["--config", "profile=imagenette", f"gpus={gpus}"]
    snakemake = [sys.executable, "-m", "snakemake", *options.split(), *settings]
    planned = subprocess.run(snakemake, cwd=PROJECT, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    lines = (planned.stdout + planned.stderr).splitlines()
    assert len([line for line in lines if launch in line and "resnet18-lrpet-s1" in line]) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--profile", "smok"], "invalid choice: 'smok'"),
        (["--profile"], "needs a value"),
        (["--jobs", "0"], "--jobs must be"),
        (["--jobs", "two"], "--jobs must be"),
        (["--data", "no such folder"], "does not exist"),
        (["--gpus-per-run", "some"], "--gpus-per-run must be"),
        (["--gpus-per-run", ""], "--gpus-per-run must be"),
        (["--cluster", "pbs"], "--cluster must be slurm; got pbs"),
        (["--forse"], "unknown argument"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    refused = run_all(*arguments)
    assert refused.returncode == 2
    assert message in refused.stderr


TWO_RUNS = """
smoke:
  note: two runs
  cost: seconds
  settings: {epochs: 1, milestones: [], batch_size: 256, method: dense}
  seeds: [1]
  experiments:
    good: {feeds: cifar10}
    bad: {feeds: cifar10, dataset: imagefolder, model: resnet18}
"""


def start(project, *arguments):
    images = project.parent / "no images"  # with no folder at all nothing would be trained
    images.mkdir(exist_ok=True)
    return run_all(*arguments, root=project, LRPET_RESULTS="", LRPET_FIGURES="", LRPET_DATA=str(images))


ONE_RUN = TWO_RUNS[: TWO_RUNS.index("    bad: ")]


def small_project(root, experiments):
    """Make a copy of the project with other experiments and small notebooks."""
    for name in ("lrpet", "profiles", "scripts", "paper"):
        shutil.copytree(PROJECT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "run_all.sh", "pyproject.toml"):
        shutil.copy(PROJECT / name, root)
    shutil.copytree(PROJECT / "results" / "short", root / "results" / "short")  # of which 01 shows a run
    (root / "notebooks").mkdir()
    shutil.copy(PROJECT / "notebooks" / "01_cifar10.ipynb", root / "notebooks")
    alone = dict.fromkeys(("00_method", "02_imagenet", "06_rank_search"), "1 + 1")
    for name, source in (alone | dict.fromkeys(READERS, "profile = ''")).items():
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
        notebook = nbformat.v4.new_notebook(
            cells=[cell],
            metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}},
        )
        nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")
    (root / "experiments.yaml").write_text(experiments)
    return root


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A copy of the project after its first start: a short run, and one that finds no images."""
    root = small_project(tmp_path_factory.mktemp("a project") / "lrpet", TWO_RUNS)
    return root, start(root)


def finished(project):
    return [
        json.loads(path.read_text())["finished"]
        for path in (project / "results").glob("smoke/runs/*/environment.json")
        if "digits" in str(path)
    ]


@pytest.mark.slow
def test_missing_run_is_named_and_fails(started):
    project, done = started
    assert done.returncode == 1
    assert "bad-s1: failed: " in done.stdout
    assert "1 of 2 complete" in done.stdout
    notebook = project / "results" / "smoke" / "notebooks" / "bad-s1.ipynb"
    assert f"missing: bad-s1; how far it came: {notebook}" in done.stdout and notebook.is_file()
    assert all(f"missing: {name}, not begun" in done.stdout for name in ("03_ablations", "08_tables"))
    assert f"report: {project / 'results' / 'smoke' / 'report.html'}" in done.stdout  # of what is there
    assert (project / "results" / "smoke" / "notebooks" / "00_method.done").is_file()


@pytest.mark.slow
def test_second_instance_is_refused_and_a_dead_ones_lock_is_not(started):
    project, _ = started
    lock = project / "results" / "smoke" / "run_all.lock"
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused = start(project)
    assert refused.returncode == 1
    assert "another run_all.sh" in refused.stderr
    assert lock.is_file()  # the next test starts with it, and with Snakemake's own
    locks = lock.parent / ".snakemake" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    (locks / "0.input.lock").write_text(str(project))


@pytest.mark.slow
def test_complete_run_is_kept_whatever_fails_or_changes(started):
    project, _ = started
    before = finished(project)
    (project / "experiments.yaml").write_text(ONE_RUN)
    with open(project / "lrpet" / "training" / "loop.py", "a") as file:
        file.write("# changed\n")
    done = start(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 complete" in done.stdout
    assert "08_tables: done" in done.stdout and "good-s1: begins" not in done.stdout
    again = start(project)
    assert again.returncode == 0
    assert [line.split()[1] for line in again.stdout.splitlines() if "begins" in line] == ["09_report:"]
    page = (project / "results" / "smoke" / "report.html").read_text()
    assert page.count("</html>") == 1
    assert not re.search(r'(src|href)="(?!data:|#|")', page)  # nothing from elsewhere
    assert finished(project) == before and len(before) == 1
    # what a notebook has read decides, not the time: this summary is older than the notebooks that read it
    summary = next((project / "results" / "smoke" / "runs").glob("digits-*/summary.json"))
    (summary.parent / "SHA256SUMS").unlink()
    summary.write_text(summary.read_text().replace("\n", "\n\n", 1))
    os.utime(summary, (0, 0))
    begun = [line.split()[1] for line in start(project).stdout.splitlines() if "begins" in line]
    assert "08_tables:" in begun and "good-s1:" not in begun


# A folder that may only be read, for this command and what it starts.
READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'


@pytest.mark.slow
def test_the_project_may_be_read_only_where_the_results_are_elsewhere(tmp_path):
    project = small_project(tmp_path / "project", ONE_RUN)
    read_only = ["unshare", "--mount", "bash", "-c", READ_ONLY, "-", str(project)]
    if not shutil.which("unshare") or subprocess.run([*read_only, "true"], capture_output=True).returncode:
        pytest.skip("only root of Linux can make a folder read-only for one process")
    environment = {**os.environ, "LRPET_PYTHON": sys.executable}
    touch = subprocess.run([*read_only, "touch", project / "a"], capture_output=True)
    assert touch.returncode != 0  # it is
    done = subprocess.run(
        [*read_only, project / "run_all.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 complete" in done.stdout and "08_tables: done" in done.stdout
    inside = {**environment, "LRPET_RESULTS": "", "LRPET_FIGURES": ""}
    refused = subprocess.run([*read_only, project / "run_all.sh"], env=inside, capture_output=True, text=True)
    assert refused.returncode == 1 and "set LRPET_RESULTS" in refused.stderr
