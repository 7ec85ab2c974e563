"""How much memory a piece of work takes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes"]


def peak_bytes(task: Callable, device: torch.device) -> int:
    """Return by how many bytes the tensors of PyTorch grow at most while a task runs.

    Args:
        task: function of no argument; it is run twice, once to warm up.
        device: where its tensors are.

    >>> peak_bytes(lambda: torch.zeros(1000), torch.device("cpu")) >= 4000
    True
    """
    task()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        task()
    with tempfile.TemporaryDirectory() as folder:
        record.export_chrome_trace(str(Path(folder, "trace.json")))
        events = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    allocations = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    now = peak = 0
    for _, change in allocations:
        now += change
        peak = max(peak, now)
    return peak
