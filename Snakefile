# One job per run of the profile, then the tables. run_all.sh starts this; by hand:
# snakemake --cores 2 --config profile=smoke
# What Snakemake calls a core is a place for one run; all runs share the machine's cores and its GPUs.
# With profiles/slurm each job is a Slurm job, and this file is read again where it runs.
import os
import shlex
import sys
from pathlib import Path

import yaml

from lrpet.paths import PROJECT, results_root
from lrpet.experiments import GRADIENT, MAIN, OBJECTS, load_profile
from lrpet.files import digest

# What every job inherits.
os.environ["PYTHON"] = sys.executable
os.environ["LRPET_RESULTS"] = str(results_root().absolute())  # the same folder from wherever a notebook runs
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel "python3" is this Python's, not the user's
GPUS = int(config.get("gpus", 1))  # per run; with several, torchrun starts a process on each
CLUSTER, IN_JOB = config.get("cluster"), "SLURM_CPUS_ON_NODE" in os.environ
if not CLUSTER:
    at_a_time = (workflow.cores or 1) * max(1, GPUS)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_a_time)))
elif IN_JOB:
    os.environ["OMP_NUM_THREADS"] = str(max(1, int(os.environ["SLURM_CPUS_ON_NODE"]) // max(1, GPUS)))

PROFILE = load_profile(config.get("profile", "smoke"))
EXECUTED = results_root() / PROFILE.name / "notebooks"
RUNS = {e.config.run_id: e for e in reversed(PROFILE.experiments)}  # once, if two names mean one run
if config.get("draw"):
    RUNS = {}  # nothing is trained, only drawn
# Notebooks that read no run of the grid, with what papermill is given. The search takes hours except in smoke, so
# where nothing is to be trained it is shown if it is there.
ALONE = {"00_method": ""}
if PROFILE.name == "smoke":
    digits = "dataset: digits, search_epochs: 4, final_epochs: 20, trials: 16"
    digits += ", batch_size: 64, validation_fraction: 0.2, profile: smoke"
    ALONE |= {"02_imagenet": "", "06_rank_search": f"-y '{{{digits}}}'"}
elif PROFILE.name == "scaled" and (not config.get("draw") or (EXECUTED.parent / "search").is_dir()):
    ALONE["06_rank_search"] = ""
STORE = ["03_ablations", "04_singular_values", "05_gradient_norms", "08_tables"]
if PROFILE.name in GRADIENT:
    STORE = ["10_gradient_projection"]
if PROFILE.name in OBJECTS:
    STORE = []
TASKS = sorted({experiment.config.task for experiment in RUNS.values()} & {"detection", "segmentation"})
WINGS = [PROJECT / "lrpet" / wing for wing in ("tables", "figures")]
READ = [PROJECT / "paper" / "reported.csv", *(file for wing in WINGS for file in sorted(wing.glob("*.py")))]
DIGEST = """\"$PYTHON\" -c 'import sys; from lrpet.files import digest; print(digest(sys.argv[1:]))'"""
SUMMARIES = [experiment.config.folder() / "summary.json" for experiment in RUNS.values()]


def in_notebook(experiment):
    """Runs of the main table leave an executed notebook, which costs ten seconds and torchrun cannot do."""
    return experiment.feeds in MAIN and GPUS <= 1


def trace_of(experiment):
    return EXECUTED / f"{experiment.name}.{'ipynb' if in_notebook(experiment) else 'log'}"


def command_of(experiment):
    if not in_notebook(experiment):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", GPUS] if GPUS > 1 else []
        run = [sys.executable, *launch, "-m", "lrpet", "run", experiment.name, "--profile", PROFILE.name]
        command = ["scripts/told.sh", trace_of(experiment), *run]
    else:  # YAML: papermill reads JSON's 1e-05 as text. All fields: no default of a notebook matters
        fields = yaml.safe_dump(experiment.config.to_dict(), default_flow_style=True, width=10**6).strip()
        notebook = f"notebooks/{MAIN[experiment.feeds]}.ipynb"
        command = ["scripts/execute.sh", notebook, trace_of(experiment), "-y", fields]
    return shlex.join(map(str, command))


# Where Snakemake keeps its notes, as the project's folder may be read-only; jobs run in that all the same.
workdir: results_root() / PROFILE.name


shell.prefix(f"set -euo pipefail; cd {shlex.quote(str(PROJECT))}; ")


def literal(path):
    """Return a path as Snakemake writes one in which braces mean themselves."""
    return str(path).replace("{", "{{").replace("}", "}}")


rule all:
    input:
        SUMMARIES,  # asked for by name: tables that are there do not make up for a run that is missing
        expand(EXECUTED / "{notebook}.done", notebook=ALONE),
        expand(EXECUTED / "{notebook}.done", notebook=STORE),
        expand(EXECUTED / "11_{task}.done", task=TASKS),


# Times tell nothing of a run that came in an archive, or after the clock was set back. Contents do.
MARKS = {name: name for name in STORE} | {f"11_{task}": "11_detection_segmentation" for task in TASKS}
for name, notebook in ({} if IN_JOB else MARKS).items():
    mark, read = EXECUTED / f"{name}.done", [PROJECT / "notebooks" / f"{notebook}.ipynb", *READ, *SUMMARIES]
    if mark.is_file() and all(map(os.path.isfile, read)) and mark.read_text().strip() != digest(read):
        mark.unlink()


# The executed notebook is a log, which Snakemake keeps when a job fails: it shows where and why.
rule alone:
    input:
        literal(PROJECT) + "/notebooks/{notebook}.ipynb",
    output:
        touch(EXECUTED / "{notebook}.done"),
    log:
        EXECUTED / "{notebook}.ipynb",
    wildcard_constraints:
        notebook="|".join(ALONE),
    params:
        given=lambda wildcards: ALONE[wildcards.notebook],
    priority: len(RUNS) + 1  # the search for ranks takes longest, so it begins first
    shell:
        "scripts/execute.sh {input:q} {log:q} {params.given}"


rule store:  # notebooks that read what the runs left; what each has read stands in its .done
    input:
        literal(PROJECT) + "/notebooks/{notebook}.ipynb",
        *map(literal, READ),
        SUMMARIES,
    output:
        EXECUTED / "{notebook}.done",
    log:
        EXECUTED / "{notebook}.ipynb",
    wildcard_constraints:
        notebook="|".join(STORE) or "none",
    params:
        profile=PROFILE.name,
    shell:
        "scripts/execute.sh {input[0]:q} {log:q} -p profile {params.profile}; "
        "{DIGEST} {input:q} >{output:q}"


rule objects:  # boxes or masks
    input:
        literal(PROJECT) + "/notebooks/11_detection_segmentation.ipynb",
        *map(literal, READ),
        SUMMARIES,
    output:
        EXECUTED / "11_{task}.done",
    log:
        EXECUTED / "11_{task}.ipynb",
    wildcard_constraints:
        task="detection|segmentation",
    params:
        profile=PROFILE.name,
    shell:
        "scripts/execute.sh {input[0]:q} {log:q} -p profile {params.profile} -p task {wildcards.task}; "
        "{DIGEST} {input:q} >{output:q}"


# A run has no input: it is done when its summary.json is there, whatever has changed since.
# update() keeps Snakemake from deleting the summary of a finished run when something after it fails.
for place, experiment in enumerate(RUNS.values()):  # reversed: what experiments.yaml names first has priority

    rule:
        name:
            experiment.name
        output:
            update(experiment.config.folder() / "summary.json"),
        log:
            trace_of(experiment),
        params:
            command=command_of(experiment),
        priority: place + 1
        resources:
            gpu=GPUS,  # on one machine a share of its devices; run_all.sh has as many as runs at a time
        shell:
            "{params.command}"
