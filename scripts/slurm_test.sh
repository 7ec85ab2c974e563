#!/usr/bin/env bash
# Submit runs to a real Slurm of one node, which this starts on the loopback interface and ends again:
# run_all.sh with one job per run, with two processes per run, and both sbatch examples of profiles/slurm.
# Exit status 0 means that all of it went as it should. Needs root, and Debian's packages: apt-get install -y
# --no-install-recommends slurm-wlm munge. Everything except two links in /etc/slurm stays in one folder, WORK
# (default: a new one, deleted at the end). The two GPUs of its node are made up: what was asked for counts.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/clock.sh
. "$ROOT/scripts/clock.sh"
# shellcheck source=scripts/environment.sh
. "$ROOT/scripts/environment.sh"
[ "$(id -u)" = 0 ] || die "this must be root, as slurmd is, which starts jobs as their users"
for command in munged slurmctld slurmd sbatch; do
    command -v "$command" >/dev/null ||
        die "$command is not here; do: apt-get install -y --no-install-recommends slurm-wlm munge"
done
[ ! -e /etc/slurm/slurm.conf ] ||
    die "/etc/slurm/slurm.conf is there already: this is for machines without a Slurm of their own"
work=${WORK:-$(mktemp -d)}
mkdir -p "$work"/{munge,state,spool}
export PYTHON LRPET_PYTHON=$PYTHON LRPET_RESULTS=$work/results LRPET_FIGURES=$work/figures

finish() {
    local file
    for file in slurmd slurmctld munged; do
        [ ! -s "$work/$file.pid" ] || kill "$(cat "$work/$file.pid")" 2>/dev/null || true
    done
    rm -f /etc/slurm/slurm.conf /etc/slurm/gres.conf
    [ -n "${WORK:-}" ] || { sleep 2 && rm -rf "$work"; }
}
trap finish EXIT

node=$(hostname -s)
cpus=$(nproc --all) # all, because OMP_NUM_THREADS is what it says otherwise
cat >"$work/slurm.conf" <<TEXT
ClusterName=loopback
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
AuthInfo=socket=$work/munge/socket
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MinJobAge=3600
MpiDefault=none
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=$node NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=8000 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=$node Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
TEXT
printf "Name=gpu File=%s\n" /dev/null /dev/zero >"$work/gres.conf"
mkdir -p /etc/slurm
ln -s "$work"/{slurm,gres}.conf /etc/slurm # where the plugin's jobs look: they drop SLURM_CONF
chmod 700 "$work/munge"
head -c 1024 /dev/urandom >"$work/munge/key"
chmod 400 "$work/munge/key"
munged --force --socket="$work/munge/socket" --key-file="$work/munge/key" \
    --pid-file="$work/munged.pid" --log-file="$work/munge/log" \
    --seed-file="$work/munge/seed"
slurmctld
slurmd -N "$node"
for _ in $(seq 30); do
    if [ "$(sinfo --noheader --format %T)" = idle ]; then break; fi
    sleep 1
done
sinfo --noheader --format "%N %T, %c CPUs, %G"

# A copy of the project with a grid of three short runs, one of which leaves a notebook, and with empty
# notebooks.
project=$work/project
mkdir -p "$project/notebooks"
cp -r "$ROOT"/{lrpet,profiles,scripts,paper,Snakefile,run_all.sh,pyproject.toml} "$project"
cp "$ROOT/notebooks/01_cifar10.ipynb" "$project/notebooks"
mkdir "$project/results" && cp -r "$ROOT/results/short" "$project/results" # of which 01 shows a run
"$PYTHON" - "$ROOT" "$project" <<'TEXT'
import sys
from pathlib import Path

import nbformat
import yaml

root, project = map(Path, sys.argv[1:])
for path in root.glob("notebooks/*.ipynb"):
    if path.stem != "01_cifar10":
        cell = nbformat.v4.new_code_cell("profile = ''", metadata={"tags": ["parameters"]})
        kernel = {"name": "python3", "display_name": "", "language": "python"}
        notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
        nbformat.write(notebook, project / "notebooks" / path.name)
grid = {
    "note": "three runs",
    "cost": "seconds",
    "settings": {"epochs": 4, "milestones": [2, 3], "batch_size": 64},
    "seeds": [1],
    "experiments": {
        "dense": {"feeds": "cifar10", "method": "dense"},
        "lrp": {"feeds": "ablations", "method": "lrp"},
        "lrpet": {"feeds": "ablations", "method": "lrpet"},
    },
}
(project / "experiments.yaml").write_text(yaml.safe_dump({"smoke": grid}))
TEXT
sed -i -e 's/mem_mb: .*/mem_mb: 2000/' -e 's/cpus_per_gpu: .*/cpus_per_gpu: 1/' \
    "$project/profiles/slurm/config.yaml"
cd "$project"
export PYTHONPATH=$project

submitted() {
    grep -c '_slurm_rpc_submit_batch_job: JobId=' "$work/slurmctld.log" || true
}

processes() {
    "$PYTHON" -c 'import json, sys; print(*sorted({json.load(open(f))["processes"] for f in sys.argv[1:]}))' \
        "$work"/results/smoke/runs/*/environment.json
}

expect() {
    [ "$2" = "$3" ] || die "$1: expected $3, got $2"
    echo "== $1: $2"
}

./run_all.sh --cluster slurm --gpus-per-run 0
jobs=$(submitted)
[ "$jobs" -ge 9 ] || die "three runs and six notebooks were to be jobs; Slurm got $jobs"
expect "processes of a run" "$(processes)" 1

rm -r "$work/results"
./run_all.sh --cluster slurm --gpus-per-run 2
expect "processes of a run on two GPUs" "$(processes)" 2
expect "runs for which Slurm gave two GPUs" "$(scontrol show jobs | grep -c 'TresPerJob=gres:gpu:2')" 3

options=(--wait --gpus-per-node=2 --cpus-per-task=1 --output "$work/sbatch.log")
rm -r "$work/results"
sbatch "${options[@]}" profiles/slurm/one_node.sbatch lrpet-s1 --device cpu ||
    die "one_node.sbatch failed: $(cat "$work/sbatch.log")"
expect "processes of one_node.sbatch" "$(processes)" 2

# There is one node, so the two machines are two tasks on it.
rm -r "$work/results"
sbatch "${options[@]}" --nodes=1 --ntasks=2 profiles/slurm/several_nodes.sbatch lrpet-s1 --device cpu ||
    die "several_nodes.sbatch failed: $(cat "$work/sbatch.log")"
expect "processes of several_nodes.sbatch" "$(processes)" 4
echo "all of it went as it should, in $(took) s"
