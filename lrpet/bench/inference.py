"""Latency and throughput of the dense and of the compact network, against what the multiply-adds promise."""

from __future__ import annotations

import copy
import importlib.util
import os
from functools import partial

import torch

from lrpet.lowrank.batchnorm import fold_batchnorm
from lrpet.lowrank.cost import cost
from lrpet.lowrank.factorize import factorize
from lrpet.lowrank.gains import measure_gains
from lrpet.lowrank.projector import LowRankProjector
from lrpet.lowrank.ranks import ranks_from_ratio
from lrpet.lowrank.timing import side_by_side
from lrpet.models import TORCHVISION, build_model

__all__ = ["bench_inference"]
BATCHES = (1, 256)


@torch.inference_mode()
def bench_inference(
    model: str = "resnet56",
    prune_ratio: float = 0.57,
    device: str = "cpu",
    rounds: int = 7,
    seconds: float = 20,
) -> dict:
    """Compare dense and compact inference, BatchNorm folded in both, in every setting a user can choose.

    Args:
        model: a name of ``build_model``; random weights, projected.
        prune_ratio: decides the ranks.
        device: "cpu" or "cuda".
        rounds: timed repetitions of each; fewer, but two at least, where they take longer than ``seconds``.
        seconds: see ``rounds``; for one setting.

    Returns:
        ``ideal``, dense by compact multiply-adds; ``rows``, one per batch size, number of threads, memory
        format and mode (eager or ``torch.compile``, at all threads only), each with the seconds of ``dense``,
        ``compact`` and, if eager, ``selective`` (compact with ``min_gain=1``: layers that lose stay dense),
        and the gain of the latter two; ``layers``, the measured gain of each distinct one, for each batch
        size, and its ideal.
    """
    where = torch.device(device)
    torch.manual_seed(0)
    network = build_model(model).to(where).eval()
    ranks = ranks_from_ratio(network, prune_ratio)
    LowRankProjector(network, ranks).step()
    edge = 64 if model in TORCHVISION else 32
    counted = cost(network, (3, edge, edge), ranks)
    all_threads, rows, layers = torch.get_num_threads(), [], []
    for batch in BATCHES:
        for threads in sorted({1, all_threads}) if device == "cpu" else [all_threads]:
            for memory in ("contiguous", "channels_last"):
                torch.set_num_threads(threads)
                layout = torch.channels_last if memory == "channels_last" else torch.contiguous_format
                x = torch.randn(batch, 3, edge, edge, device=where).to(memory_format=layout)
                dense = fold_batchnorm(network).to(memory_format=layout)
                gains = measure_gains(dense, ranks, x)
                variants = {
                    "dense": dense,
                    "compact": factorize(dense, ranks),
                    "selective": factorize(dense, _winners(ranks, gains)),
                }
                variants = {name: variant.to(memory_format=layout) for name, variant in variants.items()}
                modes = (
                    ("eager", "compiled") if threads == all_threads and _can_compile(device) else ("eager",)
                )
                for mode in modes:
                    row = {"batch": batch, "threads": threads, "memory": memory, "mode": mode}
                    row |= _timed(variants, x, mode, rounds, seconds)
                    rows.append(row | {"kept_dense": sum(gain < 1 for gain in gains.values())})
                if threads == all_threads and memory == "channels_last":
                    seen = {(c.N, c.D, c.dense_macs): c for c in counted.layers if c.name in gains}
                    layers += [
                        {
                            "batch": batch,
                            "layer": c.name,
                            "N": c.N,
                            "D": c.D,
                            "rank": c.rank,
                            "gain": gains[c.name],
                            "ideal": c.dense_macs / c.macs,
                        }
                        for c in seen.values()
                    ]
    torch.set_num_threads(all_threads)
    return {
        "prune_ratio": prune_ratio,
        "image_edge": edge,
        "ideal": counted.dense_macs / counted.macs,
        "rows": rows,
        "layers": layers,
    }


def _timed(variants: dict, x: torch.Tensor, mode: str, rounds: int, seconds: float) -> dict:
    """Return the seconds of each variant of a network, and its gain over the first, the dense one."""
    torch.compiler.reset()
    if mode == "compiled":  # each takes a good part of a minute, so only the two that matter most
        variants = {name: torch.compile(copy.deepcopy(variants[name])) for name in ("dense", "compact")}
    tasks = {name: partial(variant, x) for name, variant in variants.items()}
    timings = side_by_side(tasks, rounds, x.device, seconds=seconds)
    row = {"n": timings["dense"]["n"]}
    row |= {f"{name}_seconds": t["median_seconds"] for name, t in timings.items()}
    row |= {f"{name}_gain": 1 / t["ratio_to_first"] for name, t in timings.items() if name != "dense"}
    return row


def _winners(ranks: dict[str, int], gains: dict[str, float]) -> dict[str, int]:
    """Return the ranks of the layers that are not slower as factors: what ``min_gain=1`` makes of these."""
    return {name: rank for name, rank in ranks.items() if gains.get(name, 1.0) >= 1}


def _can_compile(device: str) -> bool:
    """Tell whether torch.compile has what it needs: a C++ compiler on a CPU, Triton on a GPU."""
    if device == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(os.access(os.path.join(folder, "g++"), os.X_OK) for folder in os.get_exec_path())
