#!/usr/bin/env bash
# Execute a notebook headless: execute.sh NOTEBOOK EXECUTED [papermill arguments], with PYTHON in the environment.
# What it prints goes to a .log beside EXECUTED, to be watched with tail -f; EXECUTED shows where a failure happened.
set -euo pipefail

notebook=$1 executed=$2
shift 2
name=$(basename "$executed" .ipynb)
log=${executed%.ipynb}.log
echo "$(date +%T) $name: begins"
# The kernel is this Python's own, whatever the notebook names and whatever the user has installed.
if ! "$PYTHON" -m papermill "$notebook" "$executed" --kernel python3 --cwd notebooks --no-progress-bar --log-output "$@" >"$log" 2>&1; then
    echo "$(date +%T) $name: failed: $(grep -v '^ *$' "$log" | tail -n 1) ($executed)"
    exit 1
fi
echo "$(date +%T) $name: done in $SECONDS s"
