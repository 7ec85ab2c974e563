#!/usr/bin/env bash
# Run a command and say when it begins and how it ends: told.sh LOG COMMAND…. What it prints goes to LOG, to
# be watched with tail -f.
set -euo pipefail

# shellcheck source=scripts/clock.sh
. "$(dirname "$0")/clock.sh"
log=$1
shift
name=$(basename "$log" .log)
echo "$(date +%T) $name: begins"
mkdir -p "$(dirname "$log")"
if ! "$@" >"$log" 2>&1; then
    echo "$(date +%T) $name: failed: $(grep -v '^ *$' "$log" | tail -n 1) ($log)"
    exit 1
fi
echo "$(date +%T) $name: done in $(took) s"
