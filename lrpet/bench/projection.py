"""Projection of all layers of a network, against one SVD per layer."""

from __future__ import annotations

import importlib.util

import torch

from lrpet.bench.in_training import InTraining
from lrpet.bench.memory import peak_bytes
from lrpet.lowrank.ranks import ranks_from_ratio
from lrpet.lowrank.timing import side_by_side
from lrpet.models import TORCHVISION, build_model

__all__ = ["bench_projection"]


def bench_projection(
    model: str = "resnet56",
    prune_ratio: float = 0.57,
    device: str = "cpu",
    rounds: int = 15,
    seconds: float = 150,
) -> dict:
    """Compare one projection of all layers with one ``torch.linalg.svd`` per layer, the usual main cost.

    The weights are those of a network in training, ten steps of SGD (random images) after its last
    projection.

    Args:
        model: a name of ``build_model``.
        prune_ratio: decides the ranks.
        device: "cpu" or "cuda".
        rounds: timed repetitions of each; fewer, but two at least, where they take longer than ``seconds``.
        seconds: see ``rounds``.

    Returns:
        ``timings`` of ``svd`` (as torch defaults, full matrices), ``svd_thin`` (``full_matrices=False``),
        ``exact`` and ``fast`` (this project's projection with everything that belongs to it), and, where
        torchao is installed, ``torchao``: its prototype's SVDGrouper with a hard rank constraint, which is
        LRP without rectification. ``memory``: bytes of the model's parameters, and of what a projector holds
        and takes at most beside them. ``followed``: how many layers the fast path was certain of.
    """
    where = torch.device(device)
    torch.manual_seed(0)
    network = build_model(model).to(where)
    ranks = ranks_from_ratio(network, prune_ratio)
    edge = 64 if model in TORCHVISION else 32
    state = InTraining(network, ranks, torch.randn(16, 3, edge, edge, device=where))
    matrices = [weight.flatten(1) for weight in state.moved.values()]
    tasks = {
        "svd": lambda: [torch.linalg.svd(M) for M in matrices],
        "svd_thin": lambda: [torch.linalg.svd(M, full_matrices=False) for M in matrices],
        "exact": state.exact.step,
        "fast": state.fast.step,
    }
    versions = {}
    if importlib.util.find_spec("torchao"):  # compared with where it is installed; not a dependency
        versions["torchao"] = importlib.metadata.version("torchao")
        grouper = importlib.import_module("torchao.prototype.pat.group").SVDGrouper
        constraint = importlib.import_module("torchao.prototype.pat.optim").MinRankConstraint

        def torchao():
            for name, weight in state.weights.items():
                K = min(state.moved[name].flatten(1).shape)
                with torch.no_grad(), grouper(weight) as group:
                    constraint(0.0, min_sparsity=(K - ranks[name] - 0.5) / K).apply_(group.p, 0.0)

        tasks["torchao"] = torchao
    state.restore()
    followed = sum(layer.reason == "followed" for layer in state.fast.step())
    memory = {"model_bytes": sum(p.numel() * p.element_size() for p in network.parameters())}
    memory["bases_bytes"] = sum(basis.numel() * basis.element_size() for basis in state.fast._bases.values())
    for name, projector in (("exact", state.exact), ("fast", state.fast)):
        state.restore()
        memory[f"{name}_step_bytes"] = peak_bytes(projector.step, where)
    timings = side_by_side(tasks, rounds, where, prepare=state.restore, seconds=seconds)
    return {
        "prune_ratio": prune_ratio,
        "layers": len(ranks),
        "followed": followed,
        "timings": timings,
        "memory": memory,
        **versions,
    }
