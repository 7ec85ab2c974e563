#!/usr/bin/env bash
# Set up what is missing, then lint and run the tests that are not marked slow. With --all run every test, those
# of other people's networks too, then the notebooks that train nothing, and compare their outputs. Other
# arguments go to pytest: ./run_tests.sh -k projection. Exit status 0 means that everything passed.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=scripts/clock.sh
. "$ROOT/scripts/clock.sh"
# shellcheck source=scripts/environment.sh
. "$ROOT/scripts/environment.sh"
cd "$ROOT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two processes, and the same sums on every machine
export JUPYTER_PREFER_ENV_PATH=1             # notebooks run in this environment's kernel

notebooks=""
case ${1:-} in
    "") set -- -m "not slow" ;;
    --all) shift && notebooks=yes && add_zoo && add_beside site ;;
esac

failed=""
step() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed="$failed $name"
}

step ruff "$PYTHON" -m ruff check .
step pytest "$PYTHON" -m pytest -n 2 --dist loadscope "$@"
if [ -n "$notebooks" ]; then
    LRPET_FIGURES=$(mktemp -d) # not the committed figures, whose bytes differ from machine to machine
    export LRPET_FIGURES
    trap 'rm -rf "$LRPET_FIGURES"' EXIT
    # those that train nothing; 01, 02 and 11 are executed with smoke parameters by tests
    step notebooks "$PYTHON" -m pytest --nbval --nbval-current-env notebooks/{0[03456789],10}_*.ipynb
fi

seconds=$(took)
echo "== $((seconds / 60)) min $((seconds % 60)) s"
[ -z "$failed" ] || {
    echo "failed:$failed" >&2
    exit 1
}
