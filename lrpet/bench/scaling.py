"""How the cost of a projection and of a training step grows with width, depth, batch and rank."""

from __future__ import annotations

import torch
from torch import nn

from lrpet.bench.in_training import InTraining
from lrpet.bench.memory import peak_bytes
from lrpet.lowrank.timing import side_by_side

__all__ = ["AXES", "BASE", "bench_scaling"]
BASE = {"width": 64, "depth": 8, "batch": 16, "rank": 16}
AXES = {
    "width": (16, 32, 64, 128, 256),
    "depth": (4, 8, 16, 32),
    "batch": (8, 16, 32, 64, 128),
    "rank": (4, 8, 16, 32, 48),
}
EDGE = 8  # pixels, height and width


def bench_scaling(device: str = "cpu", rounds: int = 5) -> dict:
    """Measure time and memory of a training step, an exact and a fast projection while one size grows.

    The network is a stack of 3×3 convolutions of one width, each with BatchNorm and ReLU, on 8×8 images. The
    ranks grow in proportion to the width, a quarter of it, except where the rank itself is what grows.

    Args:
        device: "cpu" or "cuda".
        rounds: timed repetitions of each.

    Returns:
        ``base``, the sizes that stand, and ``rows``: axis, value, what, median_seconds, min_seconds,
        peak_bytes.
    """
    where = torch.device(device)
    rows = []
    for axis, values in AXES.items():
        for value in values:
            sizes = {**BASE, axis: value}
            if axis == "width":
                sizes["rank"] = value // 4
            for what, measured in _measure(**sizes, rounds=rounds, device=where).items():
                rows.append({"axis": axis, "value": value, "what": what, **measured})
    return {"n": rounds, "base": BASE, "rows": rows}


def _measure(
    width: int, depth: int, batch: int, rank: int, rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).to(device)
    ranks = {str(3 * i): rank for i in range(1, depth)}  # the first one, of D = 27, stays dense
    state = InTraining(network, ranks, torch.randn(batch, 3, EDGE, EDGE, device=device), projections=2)
    tasks = {
        "training step": state.train,
        "projection, exact": state.exact.step,
        "projection, fast": state.fast.step,
    }
    timings = side_by_side(tasks, rounds, device, prepare=state.restore)
    peaks = {name: peak_bytes(task, device) for name, task in tasks.items()}
    return {
        name: {
            "median_seconds": t["median_seconds"],
            "min_seconds": t["min_seconds"],
            "peak_bytes": peaks[name],
        }
        for name, t in timings.items()
    }
