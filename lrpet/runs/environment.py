"""Where something runs: commit, versions, device, time."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from lrpet.paths import PROJECT

__all__ = ["environment"]


def environment(device: torch.device) -> dict:
    """Return where something runs: commit, versions, device, threads and the time."""
    git = ["git", "-C", str(PROJECT)]
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    ).stdout
    return {
        "commit": commit
        or os.environ.get("LRPET_COMMIT", "unknown"),  # of a copy without .git, as on a machine that is lent
        "dirty": bool(changed.strip()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # AVX2 has no products of bfloat16, see lrpet/bfloat16.py
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "started": utc_now(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":")[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        if cpuinfo.is_file()
        else []
    )
    return f"CPU {names[0] if names else platform.processor() or platform.machine()}"


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
