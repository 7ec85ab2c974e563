#!/usr/bin/env bash
# Execute a notebook headless: execute.sh NOTEBOOK EXECUTED [papermill arguments]; PYTHON is in the
# environment. EXECUTED shows where a failure happened; what papermill prints goes to a .log beside it.
set -euo pipefail

notebook=$1 executed=$2
shift 2
# The kernel is this Python's own, whatever the notebook names and whatever the user has installed.
exec "$(dirname "$0")/told.sh" "${executed%.ipynb}.log" \
    "$PYTHON" -m papermill "$notebook" "$executed" \
        --kernel python3 --cwd notebooks --no-progress-bar --log-output "$@"
