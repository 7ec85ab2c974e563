"""The script for a GPU that is lent for minutes, as far as it goes without one."""

import os
import subprocess
import sys
import tarfile

import pytest
import torch

from lrpet.experiments import load_profile
from lrpet.paths import PROJECT

FIRST = load_profile("smoke").experiments[0]


def session(*arguments):
    command = [PROJECT / "scripts" / "gpu_session.sh", *map(str, arguments)]
    environment = {**os.environ, "LRPET_PYTHON": sys.executable}
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CUDA GPU the script would start this test")
def test_a_session_resumes_from_the_archive_of_the_one_before(tmp_path):
    archive, place = tmp_path / "out.tar", f"./smoke/runs/{FIRST.config.run_id}"
    before = session(tmp_path, archive, 45, "smoke", 1)
    assert before.returncode == 0, before.stderr
    assert "no GPU here" in before.stdout and f"{FIRST.config.run_id}: training" in before.stdout
    with tarfile.open(archive) as kept:
        names = set(kept.getnames())
    assert {f"{place}/checkpoint.pt", f"{place}/summary.json"} & names  # stopped, or on a fast machine done
    after = session(tmp_path, archive, 45, "smoke", 1)
    assert after.returncode == 0, after.stderr
    assert f"{FIRST.config.run_id}: training" not in after.stdout
    complete = ", 0 complete," not in after.stdout.splitlines()[1]
    assert complete or f"{FIRST.config.run_id}: resuming" in after.stdout
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("arguments", [(), ("data", "out.tar"), ("data", "out.tar", 60, "smoke", 1, "more")])
def test_arguments_that_mean_nothing_end_with_status_2(arguments):
    refused = session(*arguments)
    assert refused.returncode == 2 and "usage: scripts/gpu_session.sh" in refused.stderr
