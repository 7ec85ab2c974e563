#!/usr/bin/env bash
# Set up what is missing, then lint, test the code, and execute the committed notebooks and compare their outputs.
# Arguments go to pytest: ./run_tests.sh -k projection. Exit status 0 means that everything passed.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=scripts/environment.sh
. "$ROOT/scripts/environment.sh"
cd "$ROOT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two processes, and the same sums on every machine
export JUPYTER_PREFER_ENV_PATH=1             # notebooks run in this environment's kernel

failed=""
step() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed="$failed $name"
}

step ruff "$PYTHON" -m ruff check .
step pytest "$PYTHON" -m pytest -n 2 --dist loadscope "$@"
if [ $# = 0 ]; then # arguments choose among the tests of the code
    # Compared with their committed outputs. Figures go elsewhere: their bytes differ from machine to machine.
    LRPET_FIGURES=$(mktemp -d)
    export LRPET_FIGURES
    trap 'rm -rf "$LRPET_FIGURES"' EXIT
    step notebooks "$PYTHON" -m pytest --nbval --nbval-current-env notebooks/00_method.ipynb notebooks/08_tables.ipynb
fi

echo "== $((SECONDS / 60)) min $((SECONDS % 60)) s"
[ -z "$failed" ] || {
    echo "failed:$failed" >&2
    exit 1
}
