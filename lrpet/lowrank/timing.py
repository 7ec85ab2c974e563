"""Pieces of work timed side by side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["side_by_side"]


def side_by_side(
    tasks: Mapping[str, Callable],
    rounds: int,
    device: torch.device,
    *,
    prepare: Callable = lambda: None,
    seconds: float = math.inf,
) -> dict[str, dict[str, float]]:
    """Time tasks in turn, A B C A B C …, after one warm-up round, and return their medians.

    Args:
        tasks: name → function of no argument.
        rounds: how many times each is timed.
        device: waited for at both ends of a task when it is a GPU.
        prepare: called before each task, outside the time.
        seconds: no round is begun after this time, but two are always timed.

    Returns:
        name → ``n``, ``median_seconds``, ``min_seconds``, ``max_seconds``, and ``ratio_to_first``, the median
        over rounds of its time by that of the first task in the same round.

    >>> sorted(side_by_side({"a": lambda: None}, 2, torch.device("cpu"))["a"])
    ['max_seconds', 'median_seconds', 'min_seconds', 'n', 'ratio_to_first']
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = {name: [] for name in tasks}
    end = time.perf_counter() + seconds
    for done in range(rounds + 1):
        if done > 2 and time.perf_counter() > end:
            break
        for name, task in tasks.items():
            prepare()
            wait()
            began = time.perf_counter()
            task()
            wait()
            times[name].append(time.perf_counter() - began)
    times = {name: values[1:] for name, values in times.items()}
    first = next(iter(times.values()))
    return {
        name: {
            "n": len(values),
            "median_seconds": statistics.median(values),
            "min_seconds": min(values),
            "max_seconds": max(values),
            "ratio_to_first": statistics.median(v / f for v, f in zip(values, first, strict=True)),
        }
        for name, values in times.items()
    }
