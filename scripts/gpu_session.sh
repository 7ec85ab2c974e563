#!/usr/bin/env bash
# For a GPU that is lent for minutes: the tests of what runs on GPUs, the benchmarks, then the runs of a
# profile, several at a time. Everything goes into one archive; started again with that archive, on this
# machine or another, it resumes where it stopped. Needs only what runs need, neither Jupyter nor Snakemake.
# Exit status 0 means that the archive is written.
set -euo pipefail

[ $# -ge 3 ] && [ $# -le 5 ] || {
    echo "usage: scripts/gpu_session.sh DATA ARCHIVE.tar SECONDS [PROFILE (paper) [RUNS AT A TIME (4)]]" >&2
    exit 2
}
data=$(realpath "$1") archive=$(realpath -m "$2") seconds=$3 profile=${4:-paper} jobs=${5:-4}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/clock.sh
. scripts/clock.sh
PYTHON=${LRPET_PYTHON:-python3}
LRPET_RESULTS=$(mktemp -d)
export LRPET_RESULTS
trap 'rm -rf "$LRPET_RESULTS" "$LRPET_RESULTS.mps"; [ -z "${CUDA_MPS_PIPE_DIRECTORY:-}" ] || echo quit | nvidia-cuda-mps-control' EXIT
[ ! -f "$archive" ] || tar -xf "$archive" -C "$LRPET_RESULTS"
mkdir -p "$LRPET_RESULTS/bench"
left() { echo $((seconds - $(took))); }

# Each of these once, finished or not, as what it left says. None may end the session or take more than a
# quarter of the time that is left.
once() {
    local file=$LRPET_RESULTS/bench/$1
    shift
    [ -e "$file" ] || [ "$(left)" -lt 60 ] || timeout "$(($(left) / 4))" "$@" >"$file" 2>&1 ||
        echo "status $?: $*" | tee -a "$file"
}
device=auto
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=cuda # where the GPU fails, a run must fail, too, and not go on on the CPU
    once cuda-tests.log "$PYTHON" -m pytest -q -p no:cacheprovider tests/lowrank tests/training/test_step.py
    for model in resnet56 resnet18 resnet50; do
        once "projection-$model.log" "$PYTHON" -m lrpet.bench projection --model "$model" --device cuda
    done
    once training.log "$PYTHON" -m lrpet.bench training --device cuda
    once inference.log "$PYTHON" -m lrpet.bench inference --device cuda
else
    echo "no GPU here: tests and benchmarks of GPUs are left out"
fi

# With NVIDIA's MPS small runs use the GPU at once; without it they take turns.
if command -v nvidia-cuda-mps-control >/dev/null && [ "$jobs" -gt 1 ]; then
    export CUDA_MPS_PIPE_DIRECTORY=$LRPET_RESULTS.mps CUDA_MPS_LOG_DIRECTORY=$LRPET_RESULTS.mps
    mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" && nvidia-cuda-mps-control -d &&
        timeout 60 "$PYTHON" -c 'import torch; torch.ones(1).cuda()' || {
        echo "no MPS here: runs take turns on the GPU"
        echo quit | nvidia-cuda-mps-control || true
        unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    }
fi
export OMP_NUM_THREADS=1 # of many processes

status=0
"$PYTHON" -m lrpet run --profile "$profile" --jobs "$jobs" --data "$data" --device "$device" \
    --time-budget "$(($(left) > 30 ? $(left) - 30 : 0))" || status=$?
rm -f "$LRPET_RESULTS/$profile"/runs/*/checkpoint.previous # half of the bytes; the newer one is whole
tar -cf "$archive.part" -C "$LRPET_RESULTS" .
mv "$archive.part" "$archive"
"$PYTHON" -m lrpet list --profile "$profile" | tail -n 1
[ "$status" = 0 ] || [ "$status" = 75 ] || echo "some runs failed, see above"
echo "took $(took) s; $archive: unpack it into results/, then python -m lrpet tables"
