# shellcheck shell=bash
# Sourced by run_all.sh and run_tests.sh, which set ROOT. Sets PYTHON to one that has the packages of
# requirements.lock and lrpet itself: $LRPET_PYTHON where that is set (conda, a GPU machine's own PyTorch),
# else that of .venv, which is made, or brought up to date, where it is not as requirements.lock says.

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# What a whole .venv was made from. A moved folder needs a new one, because a venv's scripts name their place.
stamp() {
    printf '%s\n' "$ROOT"
    cat "$ROOT/requirements.lock"
}

is_whole() {
    [ ! -e "$VENV/unfinished" ] && [ -x "$VENV/bin/python" ] && [ -f "$VENV/stamp" ] &&
        stamp | cmp -s - "$VENV/stamp"
}

find_python() {
    local name version found=""
    for name in python3.11 python3.12 python3.13 python3 python; do
        # A name can be there and yet not run: a pyenv shim of a version that is not active.
        version=$("$name" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
        case $version in
            3.11.* | 3.12.* | 3.13.*)
                if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
                    BASE=$(command -v "$name")
                    return
                fi
                version="$version without its venv module"
                ;;
        esac
        found="$found${found:+, }$name is $version"
    done
    die "Python 3.11, 3.12 or 3.13 with its venv module is needed; found: ${found:-no Python at all}." \
        "Install one, or set LRPET_PYTHON to the python of an environment made from environment.yml."
}

# Use an environment that somebody else looks after; only tell what it lacks.
use_given_python() {
    PYTHON=$LRPET_PYTHON
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" # this checkout, installed there or not
    local missing
    missing=$("$PYTHON" -c '
import importlib.metadata, re, sys, tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = project["optional-dependencies"]
texts = sum((extras[name] for name in extras.keys() - {"deploy", "segmentation"}), project["dependencies"])
wanted = [re.match(r"[\w.-]+", text)[0] for text in texts]
installed = {re.sub("[-_.]+", "-", found.name).lower() for found in importlib.metadata.distributions()}
print(*(name for name in wanted if name not in installed))' "$ROOT/pyproject.toml") ||
        die "LRPET_PYTHON=$LRPET_PYTHON does not run, or is older than Python 3.11"
    [ -z "$missing" ] ||
        die "LRPET_PYTHON=$LRPET_PYTHON lacks $missing;" \
            "do: $LRPET_PYTHON -m pip install -r $ROOT/requirements.lock"
}

install() {
    "$PYTHON" -m pip --disable-pip-version-check install --quiet --quiet --no-input --no-deps "$@" ||
        die "the installation failed as shown above; correct that and start again"
}

make_environment() {
    find_python
    # Two scripts started at once must not both install. The kernel frees the lock when this shell ends.
    { exec 8>"$ROOT/.venv.lock"; } 2>/dev/null ||
        die "$ROOT cannot be written, so it can get no .venv: set LRPET_PYTHON to a python that has the packages"
    "$BASE" -c 'import fcntl; fcntl.flock(8, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || {
        echo "waiting for another installation in $VENV"
        "$BASE" -c 'import fcntl; fcntl.flock(8, fcntl.LOCK_EX)'
    }
    if ! is_whole; then
        if [ -e "$VENV/unfinished" ] || ! "$PYTHON" -c '' 2>/dev/null ||
            { [ -f "$VENV/stamp" ] && [ "$(head -n 1 "$VENV/stamp")" != "$ROOT" ]; }; then
            rm -rf "$VENV"
        fi
        if [ -d "$VENV" ]; then
            echo "bringing .venv up to requirements.lock: seconds to minutes"
        else
            echo "making .venv from requirements.lock, once: 3 GB to download, 3 to 10 minutes"
            mkdir "$VENV"
            touch "$VENV/unfinished"
            "$BASE" -m venv "$VENV" || die "$BASE cannot make a virtual environment"
        fi
        touch "$VENV/unfinished" # stays if anything below is interrupted; the next start then begins anew
        install -r "$ROOT/requirements.lock"
        install --no-build-isolation -e "$ROOT"
        stamp >"$VENV/stamp"
        rm "$VENV/unfinished"
    fi
    exec 8>&-
}

# add_beside NAME: install the packages of requirements-NAME.lock into a folder of their own, .venv/NAME, and let
# Python find them. Without the network, or with somebody else's environment, what needs them is skipped.
add_beside() {
    [ -z "${LRPET_PYTHON:-}" ] || return 0
    local place=$VENV/$1 lock=$ROOT/requirements-$1.lock
    if ! cmp -s "$lock" "$place/stamp"; then
        echo "installing requirements-$1.lock: about a minute"
        rm -rf "$place"
        mkdir "$place"
        if ! "$PYTHON" -m pip --disable-pip-version-check install --quiet --quiet --no-input --no-deps \
            --target "$place" -r "$lock"; then
            echo "warning: requirements-$1.lock could not be installed; what needs it is skipped" >&2
            return 0
        fi
        cp "$lock" "$place/stamp"
    fi
    export PYTHONPATH="$place${PYTHONPATH:+:$PYTHONPATH}"
}

# What the tests of other people's networks need.
add_zoo() {
    add_beside zoo
    export HF_HUB_OFFLINE=1 YOLO_CONFIG_DIR="$VENV/zoo"
}

# A kernel warns at every start that it talks to papermill or JupyterLab without encryption. It does so on this
# machine's loopback alone, with messages that are signed.
quiet_kernels() {
    local file=$VENV/etc/ipython/ipython_kernel_config.py
    [ ! -f "$file" ] || return 0
    mkdir -p "${file%/*}"
    echo 'get_config().IPKernelApp.log_level = "ERROR"' >"$file"
}

VENV=$ROOT/.venv
PYTHON=$VENV/bin/python
if [ -n "${LRPET_PYTHON:-}" ]; then
    use_given_python
else
    is_whole || make_environment
    quiet_kernels
fi
