"""Ranks for a budget of multiply-adds: the same share everywhere, or where the spectra say it pays most."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lrpet.lowrank.arguments import check, is_number, renamed
from lrpet.lowrank.batchnorm import batchnorm_scale, resolve_batchnorms
from lrpet.lowrank.cost import cost
from lrpet.lowrank.layers import matrix_of, unwrap
from lrpet.lowrank.ranks import Choice, compressible_layers

__all__ = ["closest_share", "ranks_for_budget"]


@renamed(layers="include")
def ranks_for_budget(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    macs_reduction: float = 0.55,
    *,
    allocation: str = "uniform",
    batchnorms: Mapping[str, str | None] | None = None,
    include: Choice | None = None,
    exclude: Choice = (),
    example_inputs: Any = None,
) -> Mapping[str, int]:
    """Return ranks with which a network needs a given share fewer multiply-adds.

    ``uniform`` finds by bisection the ratio ρ at which the ranks K − K·ρ, not rounded, meet the budget,
    rounds them down and spends what is left on the layers that rounding hurt most. ``energy`` starts from
    rank 1 and raises by one, again and again, the rank whose next singular value brings the largest share of
    its layer's energy for a multiply-add; it wants a network that has been trained for a while, and measures
    diag(a)·M, the weight as BatchNorm scales it.

    Args:
        model: the network.
        input_shape: (C, H, W) of one image.
        macs_reduction: share of the dense network's multiply-adds to save, in (0, 1).
        allocation: "uniform" or "energy".
        batchnorms: layer name → BatchNorm name or None, for models that torch.fx cannot trace; "energy" only.
        include, exclude: None for all convolutions; else as for :func:`ranks_from_ratio`, a plan of
            :func:`lrpet.select` included.
        example_inputs: in the place of ``input_shape``, see :func:`cost`; BatchNorms are then read off a run
            as well.

    Returns:
        Layer name → R, in module order, for a plan that plan with ranks; the MACs are at most the budget. No
        rank is so high that the factors would cost as much as the dense layer.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the budget cannot be met even at rank 1 everywhere, or an argument is out of range.

    Source: largest-remainder rounding and greedy marginal gain, both textbook; the paper gives ratios, not
        budgets.

    >>> from lrpet.models import build_model
    >>> model = build_model("resnet20")
    >>> saved = cost(model, (3, 32, 32), ranks_for_budget(model, (3, 32, 32), 0.55))
    >>> round(1 - saved.macs / saved.dense_macs, 2)
    0.55
    """
    wanted = "macs_reduction is the share of multiply-adds to save, between 0 and 1"
    check(wanted, macs_reduction, is_number(macs_reduction), lambda share: 0 < share < 1)
    if allocation not in ("uniform", "energy"):
        raise ValueError(f"allocation must be 'uniform' or 'energy'; got {allocation!r}")
    model = unwrap(model)
    shapes = compressible_layers(model, include, exclude)
    dense = cost(model, input_shape, example_inputs=example_inputs)
    rows = {layer.name: layer for layer in dense.layers if layer.name in shapes and layer.dense_macs}
    ones = cost(model, input_shape, dict.fromkeys(rows, 1), example_inputs=example_inputs)
    price = {row.name: row.macs for row in ones.layers if row.name in rows}  # of one more rank
    ceiling = {
        name: max(1, min(row.N, row.D, (row.dense_macs - 1) // price[name])) for name, row in rows.items()
    }
    budget = (1 - macs_reduction) * dense.macs - (dense.macs - sum(row.dense_macs for row in rows.values()))
    if sum(price.values()) > budget:
        least = (
            1 - (dense.macs - sum(row.dense_macs for row in rows.values()) + sum(price.values())) / dense.macs
        )
        raise ValueError(
            f"macs_reduction {macs_reduction} cannot be met: rank 1 in every layer saves {least:.3f}"
        )
    if allocation == "uniform":
        ranks = _uniform(rows, price, ceiling, budget)
    else:
        ranks = _by_energy(_energy_shares(model, rows, batchnorms, example_inputs), price, ceiling, budget)
    ranks = {name: ranks[name] for name in shapes if name in ranks}
    return include.with_ranks(ranks) if hasattr(include, "with_ranks") else ranks


def closest_share(macs_of: Callable[[float], int], target: int) -> float:
    """Return the share in (0, 1], to 1/2048, at which a cost that rises with it comes closest to a target.

    Args:
        macs_of: multiply-adds of a network of which that share of channels or filters is left.
        target: multiply-adds to come close to.

    >>> round(closest_share(lambda share: round(10_000 * share**2), 2500), 3)
    0.5
    """
    low, high = 0.0, 1.0
    while high - low > 1 / 2048:
        middle = (low + high) / 2
        low, high = (middle, high) if macs_of(middle) < target else (low, middle)
    return min((high, low or high), key=lambda share: abs(macs_of(share) - target))


def _uniform(rows, price, ceiling, budget) -> dict[str, int]:
    def wanted(share: float) -> dict[str, float]:
        return {name: min(ceiling[name], max(1.0, share * min(row.N, row.D))) for name, row in rows.items()}

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        too_much = sum(price[name] * rank for name, rank in wanted(middle).items()) > budget
        low, high = (low, middle) if too_much else (middle, high)
    exact = wanted(low)
    ranks = {name: math.floor(rank) for name, rank in exact.items()}
    left = budget - sum(price[name] * rank for name, rank in ranks.items())
    for name in sorted(exact, key=lambda name: ranks[name] - exact[name]):  # largest remainder first
        if price[name] <= left and ranks[name] < ceiling[name]:
            ranks[name] += 1
            left -= price[name]
    return ranks


def _by_energy(shares, price, ceiling, budget) -> dict[str, int]:
    ranks = dict.fromkeys(shares, 1)
    left = budget - sum(price.values())
    queue = [(-share[1] / price[name], name) for name, share in shares.items() if ceiling[name] > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if price[name] > left:
            continue  # too dear now, and the budget only shrinks; cheaper layers may still fit
        ranks[name] += 1
        left -= price[name]
        if ranks[name] < ceiling[name]:
            heapq.heappush(queue, (-shares[name][ranks[name]] / price[name], name))
    return ranks


@torch.no_grad()
def _energy_shares(model, rows, batchnorms, example_inputs) -> dict[str, list[float]]:
    """Return s_i² / E of diag(a)·M for each layer, descending."""
    modules = dict(model.named_modules())
    shares = {}
    for name, bn in resolve_batchnorms(model, rows, batchnorms, example_inputs).items():
        M = matrix_of(modules[name]).double()
        if bn is not None:
            M = batchnorm_scale(modules[bn])[0].unsqueeze(1) * M
        energies = torch.linalg.svdvals(M).square()
        shares[name] = (energies / energies.sum().clamp(min=torch.finfo(energies.dtype).tiny)).tolist()
    return shares
