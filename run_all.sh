#!/usr/bin/env bash
# Set up what is missing, then train every run of a profile and make its tables and figures.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: ./run_all.sh [--profile P] [--jobs N] [--data DIR] [--gpus-per-run N] [--cluster slurm] [--dry-run]

Trains every run of profile P that is not complete yet, then makes the tables and figures of P. It can be
interrupted at any time: started again, it resumes each run from its last checkpoint.

  --profile P   a profile of experiments.yaml: smoke (default), short, scaled, selection, paper, imagenette,
                imagenet, voc, scenes
  --jobs N      runs at a time, all on the same device or devices (default: 2, or 1 on a single core);
                on a cluster: jobs submitted at a time (default: 100)
  --data DIR    folder of the images, for profiles that need one (default: LRPET_DATA); CIFAR-10 is downloaded
                into an empty one. Without it, runs that need images are not trained: the complete ones are drawn
  --gpus-per-run N  GPUs of each run (default: 1); with several, torchrun starts a process on each
  --cluster slurm   submit each run as a job, see profiles/slurm; --gpus-per-run 0 asks for no GPU
  --dry-run     only print what would be done

Exit status 0 means that every run of the profile is complete and its tables are made.
Environment: LRPET_PYTHON (an installed python, instead of .venv), LRPET_DATA, LRPET_RESULTS, LRPET_FIGURES,
LRPET_CACHE (decoded images). With the last four elsewhere, the project's own folder may be read-only.
TEXT
}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=scripts/clock.sh
. "$ROOT/scripts/clock.sh"
profile=smoke jobs="" gpus=1 cluster="" dry_run=""
while [ $# -gt 0 ]; do
    case $1 in
        --profile | --jobs | --data | --gpus-per-run | --cluster)
            [ $# -ge 2 ] || { echo "error: $1 needs a value; see --help" >&2 && exit 2; }
            case $1 in
                --profile) profile=$2 ;;
                --jobs) jobs=$2 ;;
                --data) export LRPET_DATA=$2 ;;
                --gpus-per-run) gpus=$2 ;;
                --cluster) cluster=$2 ;;
            esac
            shift 2
            ;;
        --dry-run) dry_run=yes && shift ;;
        -h | --help) usage && exit ;;
        *) echo "error: unknown argument $1; see --help" >&2 && exit 2 ;;
    esac
done
wrong() {
    echo "error: $*" >&2
    exit 2
}
case $jobs in *[!0-9]* | 0) wrong "--jobs must be a whole number of 1 or more; got $jobs" ;; esac
case $gpus in "" | *[!0-9]*) wrong "--gpus-per-run must be a whole number of 0 or more; got $gpus" ;; esac
case $cluster in "" | slurm) ;; *) wrong "--cluster must be slurm; got $cluster" ;; esac
for name in LRPET_DATA LRPET_RESULTS LRPET_FIGURES LRPET_CACHE; do # relative to the caller's folder
    case ${!name:-} in "" | /* | "~"*) ;; *) export "$name=$PWD/${!name}" ;; esac
done
data=${LRPET_DATA:-}
[ -z "$data" ] || [ -e "${data/#\~/$HOME}" ] || wrong "the data folder $data does not exist"
if [ "$(uname)" = Linux ]; then # glibc keeps freed memory: steps on a CPU are 6 % faster, the bits the same
    export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1000000000}"
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-10000000000}"
    export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-100000000}"
fi

# shellcheck source=scripts/environment.sh
. "$ROOT/scripts/environment.sh"
cd "$ROOT"
status=0
"$PYTHON" -m lrpet list --profile "$profile" || status=$? # costs, what is complete; refuses an unknown profile
[ "$status" = 0 ] || [ "$status" = 65 ] || exit "$status" # 65: a run is damaged; the others go on

cores=$("$PYTHON" -c 'import os; print(os.cpu_count() or 1)')
[ -n "$jobs" ] || jobs=$([ -n "$cluster" ] && echo 100 || echo $((cores < 2 ? 1 : 2)))
results=${LRPET_RESULTS:-$ROOT/results}
results=${results/#\~/$HOME}/$profile
case $results in *[{}]*) wrong "the results folder must have no braces in its path; got $results; set LRPET_RESULTS" ;; esac
figures=$("$PYTHON" -c 'from lrpet.paths import figures_root; print(figures_root())')/$profile
# Runs without their images, which neither --data nor an earlier download gives: the others are drawn all the same.
lacking=$("$PYTHON" -c '
import sys
from lrpet.config import BUNDLED
from lrpet.experiments import load_profile
from lrpet.paths import PROJECT
configs = {e.config.run_id: e.config for e in load_profile(sys.argv[1]).experiments}.values()
here = (*BUNDLED, *(path.name for path in PROJECT.glob("data/*")))
print(sum(c.dataset not in here and not (c.folder() / "summary.json").is_file() for c in configs))' "$profile")
draw="" hint="$lacking runs are missing and need images, so nothing is trained; give --data DIR to train them"
[ -n "$data" ] || [ "$lacking" = 0 ] || draw=yes
[ -z "$draw" ] || echo "$hint"
echo "$jobs at a time; results go to $results"
snakemake=("$PYTHON" -m snakemake --snakefile "$ROOT/Snakefile" --workflow-profile "$ROOT/profiles/default"
    --config "profile=$profile" "gpus=$gpus" "draw=$draw")
if [ -z "$cluster" ]; then
    snakemake+=(--cores "$jobs" --resources "gpu=$((jobs * gpus))")
else
    command -v sbatch >/dev/null || die "--cluster slurm needs sbatch; start this on a login node"
    snakemake+=("cluster=$cluster" --profile "$ROOT/profiles/slurm" --jobs "$jobs"
        --slurm-logdir "$results/slurm" --quiet host reason rules)
fi
if [ -n "$dry_run" ]; then
    notes=$(mktemp -d) # of Snakemake, which has no other place for them than its working directory
    trap 'rm -rf "$notes"' EXIT
    "${snakemake[@]}" --directory "$notes" --dry-run --quiet host reason rules </dev/null
    exit
fi

# One instance per results folder. The kernel frees this lock when the last process that holds it ends, killed
# or not; Snakemake's own lock would stay (hence --nolock). Python takes it: not every system has flock.
{ mkdir -p "$results/notebooks" && exec 9>"$results/run_all.lock"; } 2>/dev/null ||
    die "the results must be a folder that can be written; got $results; set LRPET_RESULTS"
"$PYTHON" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null ||
    die "another run_all.sh, or its Snakemake, works in $results; wait for it or stop it, then start again"

status=0
"${snakemake[@]}" --nolock </dev/null || status=$?

# The store decides, not Snakemake: every run complete, every notebook executed to its end.
state=$("$PYTHON" -m lrpet check --profile "$profile") || status=1
tail -n 1 <<<"$state"
missing() {
    local trace
    for trace in "$results/notebooks/$1.ipynb" "$results/notebooks/$1.log"; do
        if [ -f "$trace" ]; then echo "missing: $1; how far it came: $trace" && return; fi
    done
    echo "missing: $1, not begun"
}
awk '/ (not run|started)$/ { print $1 }' <<<"$state" | while read -r name; do missing "$name"; done
readers="03_ablations 04_singular_values 05_gradient_norms 08_tables" reporter=09_report
alone=00_method
case $profile in
    smoke) alone="00_method 02_imagenet 06_rank_search" ;;
    scaled) [ -n "$draw" ] && [ ! -d "$results/search" ] || alone="00_method 06_rank_search" ;;
    language*) readers=10_gradient_projection reporter=10_gradient_projection ;;
    voc | scenes) readers="11_detection 11_segmentation" reporter=11_detection_segmentation ;;
esac
for name in $alone $readers; do
    [ -f "$results/notebooks/$name.done" ] || missing "$name"
done
[ "$status" = 0 ] || echo "${draw:+$hint; }not everything was done; lines above with 'failed' say why and where"

# One page with all tables, pictures and origins; what is incomplete says "not run". It has no formulas, so no
# scripts.
report=$results/report.html page=$results/notebooks/$reporter.ipynb
export PYTHON
if scripts/execute.sh "notebooks/$reporter.ipynb" "$page" -p profile "$profile" &&
    "$PYTHON" -m nbconvert --to html --no-input --embed-images --HTMLExporter.mathjax_url= \
        --HTMLExporter.require_js_url= --log-level ERROR --output "$report" "$page"; then
    "$PYTHON" -m lrpet headline --profile "$profile"
    echo "report: $report"
else
    status=1
fi
seconds=$(took)
echo "took $((seconds / 60)) min $((seconds % 60)) s"
echo "tables: $results/tables"
echo "figures: $figures"
echo "executed notebooks and their logs: $results/notebooks"
exit "$status"
