#!/usr/bin/env bash
# Build the site, README with docs/ and the notebooks as they are committed, into build/site: scripts/site.sh [FOLDER].
# Nothing is executed, and the pages need no network. A link that leads nowhere is an error.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/environment.sh
. "$ROOT/scripts/environment.sh"
add_beside site
"$PYTHON" -c 'import myst_nb' 2>/dev/null || die "the site needs the packages of requirements-site.lock"
out=${1:-$ROOT/build/site}
cd "$ROOT"
"$PYTHON" -m sphinx --builder html --conf-dir docs --quiet --fail-on-warning . "$out"
cp "$out/README.html" "$out/index.html"
echo "site: $out/index.html"
