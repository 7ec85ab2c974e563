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
    """Return where something runs: commit, versions, device, threads and the time.

    Without git, or in a copy without ``.git``, the commit is that of ``LRPET_COMMIT`` or "unknown", and
    ``dirty`` is None.
    """
    commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit or os.environ.get("LRPET_COMMIT", "unknown"),
        "dirty": None if changed is None else bool(changed),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # AVX2 has no products of bfloat16
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "started": utc_now(),
    }


def _git(*arguments: str) -> str | None:
    """Return what git says of the project, not of a repository around a copy; None where it says nothing."""
    if not (PROJECT / ".git").exists():
        return None
    try:
        trust = f"safe.directory={PROJECT}"  # whose code runs here anyway; it may be another user's clone
        command = ["git", "-c", trust, "-C", str(PROJECT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.processor() or platform.machine()}"


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
