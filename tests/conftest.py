"""Every test has folders of its own and starts from the same random state."""

import signal

import pytest
import torch

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


def pytest_configure():
    """Give Ctrl-C its usual meaning, which a shell takes from what it starts in the background; the tests of faults send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
