"""Speed, measured side by side in one run: ``python -m lrpet.bench projection --model resnet56``."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from lrpet.config import results_root
from lrpet.models import MODELS, build_model
from lrpet.projector import LowRankProjector
from lrpet.ranks import ranks_from_ratio
from lrpet.runs import environment

__all__ = ["bench_projection", "side_by_side"]


def side_by_side(tasks: dict, rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Time tasks in turn, A B C A B C …, after one warm-up round each, and return their medians.

    Args:
        tasks: name → function of no argument.
        rounds: how many times each is timed.
        device: waited for at both ends of a task when it is a GPU.

    Returns:
        name → ``median_seconds``, ``min_seconds``, ``max_seconds``, and the median over rounds of its time by that of the
        first task in the same round, ``ratio_to_first``.

    >>> sorted(side_by_side({"a": lambda: None}, 2, torch.device("cpu"))["a"])
    ['max_seconds', 'median_seconds', 'min_seconds', 'ratio_to_first']
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = {name: [] for name in tasks}
    for _ in range(rounds + 1):
        for name, task in tasks.items():
            wait()
            began = time.perf_counter()
            task()
            wait()
            seconds[name].append(time.perf_counter() - began)
    first = next(iter(seconds.values()))[1:]
    return {
        name: {
            "median_seconds": statistics.median(values[1:]),
            "min_seconds": min(values[1:]),
            "max_seconds": max(values[1:]),
            "ratio_to_first": statistics.median(v / f for v, f in zip(values[1:], first, strict=True)),
        }
        for name, values in seconds.items()
    }


def bench_projection(model_name: str, prune_ratio: float, device: str = "cpu", rounds: int = 15) -> dict:
    """Compare one projection of all layers with one ``torch.linalg.svd`` a layer, the usual implementation's main cost.

    Args:
        model_name: a name of ``build_model``.
        prune_ratio: decides the ranks.
        device: "cpu" or "cuda".
        rounds: timed repetitions of each.

    Returns:
        Timings of ``step`` (this project, everything included), ``svd`` (as torch defaults, full matrices) and ``svd_thin``
        (``full_matrices=False``), and the machine they were measured on.
    """
    where = torch.device(device)
    model = build_model(model_name).to(where)
    ranks = ranks_from_ratio(model, prune_ratio)
    projector = LowRankProjector(model, ranks)
    matrices = [model.get_submodule(name).weight.detach().flatten(1).clone() for name in ranks]
    tasks = {
        "step": projector.step,
        "svd": lambda: [torch.linalg.svd(M) for M in matrices],
        "svd_thin": lambda: [torch.linalg.svd(M, full_matrices=False) for M in matrices],
    }
    timings = side_by_side(tasks, rounds, where)
    return {"benchmark": "projection", "model": model_name, "prune_ratio": prune_ratio, "n": rounds, "timings": timings, **environment(where)}


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark, print it and keep its JSON under ``results/bench``."""
    parser = argparse.ArgumentParser(prog="python -m lrpet.bench", description="Speed, measured side by side in one run.")
    parser.add_argument("benchmark", choices=["projection"])
    parser.add_argument("--model", default="resnet56", choices=MODELS)
    parser.add_argument("--prune-ratio", type=float, default=0.57)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(arguments)
    result = bench_projection(args.model, args.prune_ratio, args.device, args.rounds)
    path = Path(results_root()) / "bench" / f"projection-{args.model}-{args.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, t in result["timings"].items():
        print(f"{name:9s} median {1e3 * t['median_seconds']:9.2f} ms, {t['ratio_to_first']:6.2f} times the projection step")
    print(f"on {result['device']}, {result['threads']} threads, n={args.rounds}; kept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
