"""Every test has folders of its own and starts from the same random state."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from lrpet.paths import PROJECT

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    for name in ("CACHE", "RESULTS", "FIGURES"):
        monkeypatch.setenv(f"LRPET_{name}", str(tmp_path / name.lower()))
    monkeypatch.delenv("LRPET_DATA", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the processes that a test starts


@pytest.fixture(autouse=True)
def same_random_state():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory):
    unpack = PROJECT.parent / "shared" / "data" / "unpack.py"
    if not unpack.is_file():
        pytest.skip(f"no real CIFAR-10 here: {unpack} does not exist")
    memory = Path("/dev/shm")  # a disk can take minutes to delete 60000 files
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30
    with tempfile.TemporaryDirectory(dir=memory if roomy else tmp_path_factory.mktemp("data")) as folder:
        root = Path(folder) / "cifar10"
        subprocess.run(
            [sys.executable, str(unpack), "cifar10", "--out", str(root)], check=True, capture_output=True
        )
        yield root


def pytest_configure():
    """Give Ctrl-C its usual meaning, which a shell takes from background jobs; tests of faults send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
