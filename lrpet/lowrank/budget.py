"""Ranks for a budget of multiply-adds: the same share everywhere, or where the spectra say it pays most."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lrpet.lowrank.arguments import check, is_number, renamed
from lrpet.lowrank.batchnorm import batchnorm_scale, resolve_batchnorms
from lrpet.lowrank.cost import LayerCost, cost
from lrpet.lowrank.layers import matrix_of, resolve_unfolding, unwrap
from lrpet.lowrank.ranks import Choice, check_multiple, compressible_layers

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
    multiple_of: int = 1,
    unfolding: str | Mapping[str, str] = "rows",
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
        multiple_of: allow multiples of this alone, 16 for speed on a CPU, and the dense layer. A layer is at
            the lowest multiple or above it, so others get less, and those that rounding hurts most get more.
        unfolding: "rows", "columns", or layer name → one of them, see :class:`lrpet.LowRankProjector`.

    Returns:
        Layer name → R, in module order, for a plan that plan with ranks; the MACs are at most the budget. No
        rank is so high that the factors would cost as much as the dense layer; with ``multiple_of``, the
        rank min(N, D) says that a layer stays dense.

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
    check_multiple(multiple_of)
    if allocation not in ("uniform", "energy"):
        raise ValueError(f"allocation must be 'uniform' or 'energy'; got {allocation!r}")
    model = unwrap(model)
    unfolding = resolve_unfolding(model, unfolding)
    shapes = compressible_layers(model, include, exclude, unfolding)
    dense = cost(model, input_shape, example_inputs=example_inputs, unfolding=unfolding)
    rows = {layer.name: layer for layer in dense.layers if layer.name in shapes and layer.dense_macs}
    ones = cost(
        model, input_shape, dict.fromkeys(rows, 1), example_inputs=example_inputs, unfolding=unfolding
    )
    price = {row.name: row.macs for row in ones.layers if row.name in rows}  # of one more rank
    levels = {name: _levels(row, price[name], multiple_of) for name, row in rows.items()}
    others = dense.macs - sum(row.dense_macs for row in rows.values())
    budget = (1 - macs_reduction) * dense.macs - others
    least = sum(steps[0].macs for steps in levels.values())
    if least > budget:
        lowest = "rank 1 in every layer" if multiple_of == 1 else f"the lowest multiple of {multiple_of}"
        raise ValueError(
            f"macs_reduction {macs_reduction} cannot be met: {lowest} saves "
            f"{1 - (others + least) / dense.macs:.3f}"
        )
    if allocation == "uniform":
        ranks = _uniform({name: min(row.N, row.D) for name, row in rows.items()}, levels, budget)
    else:
        ranks = _by_energy(
            energy_shares(model, resolve_batchnorms(model, rows, batchnorms, example_inputs), unfolding),
            levels,
            budget,
        )
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


class _Level(NamedTuple):
    """A rank that a layer may have, and what the layer costs then."""

    rank: int
    macs: int


def _levels(row: LayerCost, price: int, multiple_of: int) -> list[_Level]:
    """Return the ranks that a layer may have, ascending, each with its multiply-adds."""
    K, ceiling = min(row.N, row.D), (row.dense_macs - 1) // price
    if multiple_of == 1:
        return [_Level(rank, rank * price) for rank in range(1, max(1, min(K, ceiling)) + 1)]
    levels = [_Level(rank, rank * price) for rank in range(multiple_of, min(K - 1, ceiling) + 1, multiple_of)]
    return [*levels, _Level(K, row.dense_macs)]


def _uniform(K: Mapping[str, int], levels: Mapping[str, list[_Level]], budget: float) -> dict[str, int]:
    def wanted(share: float) -> dict[str, float]:
        return {
            name: min(steps[-1].rank, max(steps[0].rank, share * K[name])) for name, steps in levels.items()
        }

    low, high = 0.0, 1.0
    tables = {name: tuple(zip(*steps, strict=True)) for name, steps in levels.items()}
    for _ in range(60):
        middle = (low + high) / 2
        macs = (np.interp(rank, *tables[name]) for name, rank in wanted(middle).items())
        low, high = (low, middle) if sum(macs) > budget else (middle, high)
    exact = wanted(low)
    at = {name: bisect.bisect_right(tables[name][0], rank) - 1 for name, rank in exact.items()}
    left = budget - sum(levels[name][i].macs for name, i in at.items())
    remainders = {}
    for name, i in at.items():
        if i + 1 < len(levels[name]):
            here, above = levels[name][i].rank, levels[name][i + 1].rank
            remainders[name] = (exact[name] - here) / (above - here)
    for name in sorted(remainders, key=remainders.get, reverse=True):
        more = levels[name][at[name] + 1].macs - levels[name][at[name]].macs
        if more <= left:
            at[name] += 1
            left -= more
    return {name: levels[name][i].rank for name, i in at.items()}


def _by_energy(shares: Mapping[str, list[float]], levels, budget: float) -> dict[str, int]:
    at = dict.fromkeys(shares, 0)
    left = budget - sum(steps[0].macs for steps in levels.values())

    def step(name: str) -> tuple[float, int]:
        """Return the energy that the next level brings for a multiply-add, and what it costs."""
        here, above = levels[name][at[name] : at[name] + 2]
        more = above.macs - here.macs
        return sum(shares[name][here.rank : above.rank]) / more, more

    queue = [(-step(name)[0], name) for name in shares if len(levels[name]) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if (more := step(name)[1]) > left:
            continue  # too dear now, and the budget only shrinks; cheaper layers may still fit
        at[name] += 1
        left -= more
        if at[name] + 1 < len(levels[name]):
            heapq.heappush(queue, (-step(name)[0], name))
    return {name: levels[name][i].rank for name, i in at.items()}


@torch.no_grad()
def energy_shares(
    model: nn.Module, batchnorms: Mapping[str, str | None], unfolding: Mapping[str, str]
) -> dict[str, list[float]]:
    """Return s_i² / E of diag(a)·M for each layer, descending.

    Args:
        model: the network.
        batchnorms: layer name → name of the BatchNorm after it, or None; its layers are measured.
        unfolding: of each layer.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = layer.weight.data.copy_(torch.diag(torch.tensor([3.0, 4.0])))
    >>> [round(share, 2) for share in energy_shares(nn.Sequential(layer), {"0": None}, {"0": "rows"})["0"]]
    [0.64, 0.36]
    """
    modules = dict(model.named_modules())
    shares = {}
    for name, bn in batchnorms.items():
        M = matrix_of(modules[name], unfolding[name]).double()
        if bn is not None:
            a = batchnorm_scale(modules[bn])[0]  # (N,), and each output has k² rows in a matrix N·k² × C
            M = a.repeat_interleave(len(M) // len(a)).unsqueeze(1) * M
        energies = torch.linalg.svdvals(M).square()
        shares[name] = (energies / energies.sum().clamp(min=torch.finfo(energies.dtype).tiny)).tolist()
    return shares
