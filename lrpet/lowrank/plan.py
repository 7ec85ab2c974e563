"""Which layers of a model take part, why the others do not, and how much of the model that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lrpet.lowrank.cost import cost
from lrpet.lowrank.layers import (
    count_parameters,
    layer_type,
    left_out,
    matrix_of,
    resolve_unfolding,
    shared_weights,
    unwrap,
    unwritable,
)
from lrpet.lowrank.ranks import (
    align_rank,
    foreign,
    matcher,
    rank_from_ratio,
    warn_of_coverage,
    warn_of_growth,
)
from lrpet.lowrank.table import LayerTable, size

__all__ = ["Plan", "PlannedLayer", "select"]


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a plan: whether it is taken, at which rank, or why it is left out."""

    name: str
    kind: str
    N: int | None  # outputs; None where the shape is not that of a layer
    D: int | None  # inputs times kernel area
    rank: int | None  # None: not chosen yet, or not taken
    taken: bool
    reason: str = ""

    @property
    def note(self) -> str:
        """Say why the layer is left out, or that its factors are larger than it is."""
        if self.rank and self.rank < min(self.N, self.D) and self.rank * (self.N + self.D) > self.N * self.D:
            return f"factors cost {self.rank * (self.N + self.D) / (self.N * self.D):.2f} of the layer"
        return self.reason


@dataclass(frozen=True, eq=False)
class Plan(LayerTable, Mapping):
    """The layers that take part, as a mapping of names to ranks, and all others with the reason.

    It prints as a table, can be given wherever ranks are taken, once they are chosen, and as ``include=`` to
    the functions that choose them.
    """

    layers: tuple[PlannedLayer, ...]
    params_share: float  # of the model's parameters, in the layers taken
    macs_share: float | None = None  # of its multiply-adds; None where no example was given

    def __getitem__(self, name: str) -> int | None:
        return {layer.name: layer.rank for layer in self.layers if layer.taken}[name]

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in self.layers if layer.taken)

    def __len__(self) -> int:
        return sum(layer.taken for layer in self.layers)

    def with_ranks(self, ranks: Mapping[str, int]) -> Plan:
        """Return the plan with these ranks; a layer without one is no longer taken.

        >>> plan = select(nn.Sequential(nn.Conv2d(3, 8, 3)))
        >>> dict(plan.with_ranks({"0": 2}))
        {'0': 2}
        """
        layers = []
        for layer in self.layers:
            if layer.taken and layer.name in ranks:
                layers.append(dataclasses.replace(layer, rank=int(ranks[layer.name])))
            else:
                reason = layer.reason or "no rank given"
                layers.append(dataclasses.replace(layer, taken=False, reason=reason))
        return dataclasses.replace(self, layers=tuple(layers))

    def cells(self) -> list[tuple[str, ...]]:
        """Return the header, then what is shown of each layer."""
        table = [("layer", "type", "N×D", "rank", "taken", "note")]
        for layer in self.layers:
            taken, rank = "yes" if layer.taken else "no", str(layer.rank or "")
            table.append((layer.name, layer.kind, size(layer.N, layer.D), rank, taken, layer.note))
        return table

    def footer(self) -> str:
        """Return how many layers are taken, and which share of the model they are."""
        macs = "" if self.macs_share is None else f" and {self.macs_share:.1%} of the multiply-adds"
        count = f"{len(self)} of {len(self.layers)} layers taken"
        return f"{count}: {self.params_share:.1%} of the parameters{macs}"


def select(
    model: nn.Module,
    include: str | Collection[str] | Callable | None = None,
    exclude: str | Collection[str] | Callable = (),
    *,
    prune_ratio: float | None = None,
    example_inputs: Any = None,
    multiple_of: int = 1,
    unfolding: str | Mapping[str, str] = "rows",
) -> Plan:
    """Choose the layers that take part, and say of every other one why it does not.

    Args:
        model: any module; of a wrapped one the network inside.
        include: a pattern of names, as ``*.mlp.*``, a list of patterns, or a function of name and module;
            None for all convolutions.
        exclude: the same, for layers to leave out.
        prune_ratio: ρ in [0, 1), to give each layer the rank K − K·ρ; None to choose ranks later.
        example_inputs: a tensor, tuple or dict to run the model on, for the share of multiply-adds, and to
            leave out layers whose weight another module reads and multiplies by itself.
        multiple_of: as for :func:`lrpet.ranks_from_ratio`, where a ratio is given.
        unfolding: "rows", "columns", or layer name → one of them, see :class:`lrpet.LowRankProjector`.

    Returns:
        A :class:`Plan`. Where it covers less than half of the parameters, or factors are larger than their
        layer, a warning says so.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the ratio is out of range, or the network is sharded.

    >>> print(select(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)), prune_ratio=0.5))
    layer  type    N×D   rank  taken  note
    0      Conv2d  8×27  4     yes
    1      Conv2d  8×9         no     grouped
    1 of 2 layers taken: 71.1% of the parameters
    """
    model = unwrap(model)
    included, excluded = matcher(include, setting="include"), matcher(exclude, setting="exclude")
    shared, rows, sizes = shared_weights(model), [], {}
    counted = None if example_inputs is None else cost(model, example_inputs=example_inputs)
    costs = {} if counted is None else {row.name: row for row in counted.layers}
    unfolding = resolve_unfolding(model, unfolding)
    for name, module in model.named_modules():
        kind, reason = layer_type(module), left_out(module)
        if kind is None and not reason:
            continue
        wanted = included(name, module) if include is not None else kind is not nn.Linear
        shape = (None, None)
        if kind is not None and (not reason or reason == "grouped"):
            shape = matrix_of(module, unfolding.get(name, "rows")).shape
            reason = reason or unwritable(module) or _untouchable(model, module, shared.get(name, []))
        if excluded(name, module):
            reason = "excluded"
        elif not reason and not wanted:
            reason = "not included"
        elif not reason and name in costs:
            reason = costs[name].note
        rank = None
        if not reason and prune_ratio is not None:
            rank = align_rank(rank_from_ratio(min(shape), prune_ratio), shape, multiple_of)
        rows.append(PlannedLayer(name, type(module).__name__, *shape, rank, not reason, reason))
        if not reason:
            sizes[name] = tuple(shape)
    taken = {id(model.get_submodule(name).weight): model.get_submodule(name).weight.numel() for name in sizes}
    params_share = sum(taken.values()) / max(1, count_parameters(model))
    macs_share = None
    if counted is not None:
        macs_share = sum(row.macs for row in counted.layers if row.name in sizes) / max(1, counted.macs)
    warn_of_coverage(params_share)
    if prune_ratio is not None:
        warn_of_growth(sizes, {row.name: row.rank for row in rows if row.taken})
    return Plan(tuple(rows), params_share, macs_share)


def _untouchable(model: nn.Module, module: nn.Module, others: list[str]) -> str:
    other = foreign(model, others)
    if other:
        return f"its weight is also that of {other}"
    return "" if module.weight.requires_grad else "frozen (requires_grad=False)"
