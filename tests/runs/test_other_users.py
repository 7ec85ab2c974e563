"""Several users of one results folder: what a group shares, and what one of them has closed."""

import json
import os
import subprocess
import sys
import tempfile

import pytest

AS_TWO = """
import json, os, sys, warnings
from pathlib import Path
from filelock import FileLock, Timeout
from lrpet import RunConfig, load_runs, run
from lrpet.training.loop import Paused

root, told = Path(sys.argv[1]), {}
shared, closed, shown = (
    RunConfig(epochs=2, milestones=(1,), batch_size=256, seed=seed) for seed in (1, 2, 3)
)

def go(config, results=root / "results", **more):
    return run(config, results=results, device="cpu", progress="off", **more)

def become(user, umask):
    os.seteuid(0)
    os.setgroups([])
    os.setegid(54321)
    os.seteuid(user)
    os.umask(umask)

def pause(config):
    try:
        go(config, time_budget=0.0)
    except Paused:
        return "paused"

alone = go(shared, root / "alone").summary["top1_pct"]  # root's, by which all that is needed is imported
load_runs(root / "alone")
become(54321, 0o002)
told["paused"] = pause(shared)
with FileLock(shared.folder(root / "results") / "run.lock"):
    become(54322, 0o002)
    try:
        FileLock(shared.folder(root / "results") / "run.lock").acquire(timeout=0)
    except Timeout:
        told["waits"] = "for the other"
become(54322, 0o002)
told["same"] = go(shared).summary["top1_pct"] == alone
become(54321, 0o022)
told["loaded"] = go(shared).summary["top1_pct"] == alone
(go(shown).folder / "checkpoint.pt").touch()  # as if it had been killed right at its end
become(54322, 0o022)
told["seed"] = go(shown).config.seed
become(54321, 0o077)
told["closed"] = pause(closed)
become(54322, 0o002)
try:
    go(closed)
except ValueError as error:
    told["refused"] = str(error)
with warnings.catch_warnings(record=True) as left_out:
    warnings.simplefilter("always")
    told["seeds"] = sorted(load_runs(root / "results").seed.tolist())
told["left_out"] = [str(warning.message) for warning in left_out]
os.seteuid(0)
print(json.dumps(told))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="only root can become one user and then another"
)
def test_two_users_share_what_their_umask_shares():
    with tempfile.TemporaryDirectory() as root:  # pytest's own are closed to others
        os.chmod(root, 0o777)
        done = subprocess.run([sys.executable, "-c", AS_TWO, root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    refused, (left_out,) = told.pop("refused"), told.pop("left_out")
    assert told == {
        "paused": "paused",
        "waits": "for the other",
        "same": True,
        "loaded": True,
        "seed": 3,
        "closed": "paused",
        "seeds": [1, 3],
    }
    assert "-s2-" in refused and "may not be read by you; ask its owner" in refused
    assert "-s2-" in left_out and left_out.endswith("is left out: Permission denied")
