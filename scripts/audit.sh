#!/usr/bin/env bash
# Look every package of requirements.lock up in the database of known vulnerabilities; needs the network. Exit
# status 0 means that each was found there and none is known to be vulnerable, 77 that the database could not be
# asked. pip-audit itself is installed into a folder of its own, deleted afterwards: it is no dependency of this
# project.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/environment.sh
. "$ROOT/scripts/environment.sh"
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"$PYTHON" -m venv "$tools"
skip() {
    echo "skipped, nothing was audited: $*"
    exit 77
}

# --strict: a package that could not be looked up is a failure, not a pass
audit() {
    "$tools/bin/pip-audit" --strict --no-deps --disable-pip --progress-spinner off --requirement "$@"
}

"$tools/bin/python" -m pip --disable-pip-version-check install --quiet "pip-audit>=2.10,<3" ||
    skip "pip-audit could not be installed"
grep "^packaging==" "$ROOT/requirements.lock" >"$tools/one.txt"
if ! told=$(audit "$tools/one.txt" 2>&1) && [[ $told = *ERROR* ]]; then
    skip "the database of known vulnerabilities does not answer: $(tail -n 1 <<<"$told")"
fi
audit "$ROOT/requirements.lock" "$@"
