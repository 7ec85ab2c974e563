"""A rank for each layer: from one ratio for all, or from a list."""

from __future__ import annotations

import fnmatch
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lrpet.lowrank.arguments import check, is_number, is_whole, renamed
from lrpet.lowrank.layers import (
    canonical_names,
    count_parameters,
    layer_type,
    left_out,
    matrix_of,
    resolve_unfolding,
    shared_weights,
    unwrap,
    unwrapped_name,
)
from lrpet.lowrank.table import LayerTable

__all__ = [
    "LayerReport",
    "Report",
    "compressible_layers",
    "rank_from_ratio",
    "ranks_from_ratio",
    "resolve_ranks",
]
Choice = str | Collection[str] | Callable  # of layers: a pattern, patterns, or a function of name and module


@renamed(layers="include")
def compressible_layers(
    model: nn.Module,
    include: Choice | None = None,
    exclude: Choice = (),
    unfolding: str | Mapping[str, str] = "rows",
) -> dict[str, tuple[int, int]]:
    """Return the layers that can be made low-rank, with the shape (N, D) of their weight as a matrix.

    Every convolution of one group counts; grouped and depthwise ones stay dense, and so do subclasses with a
    forward of their own, see :func:`lrpet.select` for the reasons. Linear layers count on request: the paper
    leaves the classifier of a CNN dense.

    Args:
        model: any module; of a wrapped one (DistributedDataParallel, torch.compile) the network inside.
        include: None for all convolutions; else a pattern of names, as ``*.mlp.*`` or ``*``, a list of such
            patterns, or a function of name and module; of all convolutions and Linear layers those that it
            fits count.
        exclude: the same, for layers to leave out.
        unfolding: "rows", "columns", or layer name → one of them, see :class:`lrpet.LowRankProjector`.

    Raises:
        TypeError: an argument is something else.

    >>> compressible_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2)))
    {'0': (8, 27)}
    """
    fits, unwanted = matcher(include), matcher(exclude, setting="exclude")
    shared, model = None, unwrap(model)
    unfolding = resolve_unfolding(model, unfolding)
    shapes = {}
    for name, module in model.named_modules():
        kind = layer_type(module)
        wanted = fits(name, module) if include is not None else kind is not nn.Linear
        if kind is None or left_out(module) or not wanted or unwanted(name, module):
            continue
        shared = shared_weights(model) if shared is None else shared
        if not foreign(model, shared.get(name, [])):
            shapes[name] = tuple(matrix_of(module, unfolding[name]).shape)
    return shapes


def foreign(model: nn.Module, names: Sequence[str]) -> str:
    """Return the first of some modules that is no layer to compress, as an embedding that shares a weight."""
    return next((name for name in names if layer_type(model.get_submodule(name)) is None), "")


def matcher(layers: Choice | None, *, setting: str = "include") -> Callable:
    """Return the function of name and module that a pattern, a list of patterns or a function stands for.

    >>> matcher(["*.mlp.*", "head"])("head", None)
    True
    """
    if callable(layers):
        return layers
    patterns = [layers] if isinstance(layers, str) else [] if layers is None else layers
    if not isinstance(patterns, Collection) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"{setting} must be null or a pattern of layer names, as '*.mlp.*', a list of such, or a "
            f"function of name and module; got {layers!r}"
        )

    def fits(name: str, module: nn.Module) -> bool:
        return name in patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return fits


def rank_from_ratio(K: int, prune_ratio: float) -> int:
    """Return R = int(K − K·ρ), at least 1.

    Args:
        K: min(N, D), the number of singular values.
        prune_ratio: ρ in [0, 1), the share that is removed.

    Raises:
        TypeError: K is no integer, or the ratio no number.
        ValueError: the ratio is outside [0, 1), or K is not positive.

    Source: the authors' code; truncation toward zero in double precision.

    >>> [rank_from_ratio(K, 0.57) for K in (16, 32, 64)]
    [6, 13, 27]
    """
    check("K is the number of singular values, a whole number of 1 or more", K, is_whole(K), lambda K: K >= 1)
    wanted = "prune_ratio is the share of singular values to remove, 0 ≤ ratio < 1"
    check(wanted, prune_ratio, is_number(prune_ratio), lambda ratio: 0 <= ratio < 1)
    return max(1, int(int(K) - int(K) * float(prune_ratio)))


def check_multiple(multiple_of: int) -> None:
    """Raise where ``multiple_of`` is no whole number of 1 or more."""
    wanted = "multiple_of is what every rank shall be a multiple of, a whole number of 1 or more"
    check(wanted, multiple_of, is_whole(multiple_of), lambda multiple: multiple >= 1)


def align_rank(rank: int, shape: tuple[int, int], multiple_of: int) -> int:
    """Return a rank rounded up to a multiple; min(N, D), dense, where that multiple's factors save nothing.

    Args:
        rank: R.
        shape: (N, D).
        multiple_of: 1 leaves every rank as it is.

    Raises:
        TypeError, ValueError: ``multiple_of`` is no whole number of 1 or more.

    >>> [align_rank(rank, (64, 576), 16) for rank in (1, 27, 33, 49)]
    [16, 32, 48, 64]
    """
    check_multiple(multiple_of)
    if multiple_of == 1:
        return rank
    N, D = shape
    aligned = -(-rank // multiple_of) * multiple_of
    return aligned if aligned * (N + D) < N * D else min(N, D)


@renamed(layers="include")
def ranks_from_ratio(
    model: nn.Module,
    prune_ratio: float,
    *,
    include: Choice | None = None,
    exclude: Choice = (),
    multiple_of: int = 1,
    unfolding: str | Mapping[str, str] = "rows",
) -> Mapping[str, int]:
    """Return the rank of every compressible layer for one prune ratio.

    Args:
        model: any module; see :func:`compressible_layers` for which layers count.
        prune_ratio: ρ in [0, 1).
        include: None for all convolutions; else a pattern of names, for Linear layers too, as ``*.mlp.*``, a
            list of patterns, a function of name and module, or a plan of :func:`lrpet.select`.
        exclude: the same, for layers to leave out.
        multiple_of: round each rank up to a multiple of this, 16 for speed on a CPU; a layer whose factors
            then save nothing gets min(N, D) and stays dense.
        unfolding: "rows", "columns", or layer name → one of them, see :class:`lrpet.LowRankProjector`.

    Returns:
        Layer name → R, in module order; for a plan, that plan with ranks. A warning says where the ranks
        cover less than half of the model's parameters by default, or where the factors of layers are larger
        than they are.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the ratio is out of range, or no layer can be compressed.

    Source: the paper's uniform setting, arXiv 2204.05566, experimental settings.

    >>> ranks_from_ratio(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3)), 0.57)
    {'0': 6, '2': 13}
    """
    shapes = compressible_layers(model, include, exclude, unfolding)
    if not shapes:
        raise ValueError(
            f"{type(model).__name__} has no layer to compress: no convolution with one group, or none "
            f"whose name matches {include!r}" + (f" and not {exclude!r}" if exclude else "")
        )
    ranks = {}
    for name, shape in shapes.items():
        ranks[name] = align_rank(rank_from_ratio(min(shape), prune_ratio), shape, multiple_of)
    warn_of_growth(shapes, ranks)
    if include is None:
        warn_of_coverage(sum(N * D for N, D in shapes.values()) / max(1, count_parameters(unwrap(model))))
    return include.with_ranks(ranks) if hasattr(include, "with_ranks") else ranks


def warn_of_growth(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> None:
    """Warn where factors R·(N + D) are larger than the dense weight N·D."""
    larger = []
    for name, (N, D) in shapes.items():
        if ranks[name] < min(N, D) and ranks[name] * (N + D) > N * D:
            larger.append(name)
    if larger:
        warnings.warn(
            f"at these ranks the factors of {len(larger)} of {len(shapes)} layers cost more than the layers "
            f"themselves, the first is {larger[0]!r}; lower their ranks or leave them out",
            stacklevel=3,
        )


def warn_of_coverage(share: float) -> None:
    """Warn where less than half of a model's parameters take part."""
    if share < 0.5:
        warnings.warn(
            f"only {share:.1%} of the model's parameters are in the layers with a rank; "
            "print(lrpet.select(model, '*')) shows all layers, and include=, a pattern of names, "
            "chooses among them",
            stacklevel=3,
        )


def resolve_ranks(
    model: nn.Module,
    ranks: Mapping[str, int] | Sequence[int],
    unfolding: str | Mapping[str, str] = "rows",
) -> dict[str, int]:
    """Check ranks against a model; a plain list is matched to the compressible convolutions in module order.

    Args:
        model: the network.
        ranks: layer name → R (any subset; the others stay dense), such as a plan, or one R for each
            compressible convolution, in a list or an array.
        unfolding: of the weights, which decides min(N, D): see :class:`lrpet.LowRankProjector`.

    Returns:
        Layer name → R; a module of two names appears under its first.

    Raises:
        TypeError: ranks, or one of them, is of another type.
        ValueError: a name that the model lacks, a layer that cannot be made low-rank, with the reason, a
            wrong length, a rank outside 1 … min(N, D), or layers that share a weight and not the rank or the
            unfolding.

    Source: the list form is how the authors print searched ranks.

    >>> resolve_ranks(nn.Sequential(nn.Conv2d(3, 16, 3)), [6])
    {'0': 6}
    """
    model = unwrap(model)
    unfolding = resolve_unfolding(model, unfolding)
    if not isinstance(ranks, Mapping):
        ranks = ranks.tolist() if hasattr(ranks, "tolist") else ranks
        if not isinstance(ranks, Sequence) or isinstance(ranks, str):
            raise TypeError(
                f"ranks must be a list of whole numbers or a map of layer names to them; got {ranks!r}; "
                "ranks_from_ratio makes one"
            )
        names = list(compressible_layers(model))
        if len(ranks) != len(names):
            raise ValueError(
                f"ranks has {len(ranks)} entries, but the model has {len(names)} compressible convolutions"
            )
        ranks = dict(zip(names, ranks, strict=True))
    first, shared, resolved = canonical_names(model), shared_weights(model), {}
    for given, rank in ranks.items():
        name = unwrapped_name(given, first)
        if name not in first:
            some = ", ".join(list(compressible_layers(model, "*"))[:5])
            raise ValueError(f"ranks names a layer {given!r} that the model does not have; it has {some}, …")
        module, name = model.get_submodule(name), first[name]
        other = foreign(model, shared.get(name, []))
        tied = f"its weight is also that of {other!r}, which factorizing would not shrink"
        reason = tied if other else left_out(module)
        if layer_type(module) is None or reason:
            reason = reason or "only convolutions with one group and Linear layers can"
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) cannot be made low-rank: {reason}; leave it out"
            )
        K = min(matrix_of(module, unfolding[name]).shape)
        wanted = f"rank of layer {name!r} must be an integer from 1 to {K}"
        if rank is None and hasattr(ranks, "with_ranks"):
            wanted += (
                " (to choose ranks for a plan, give it to ranks_from_ratio or ranks_for_budget as include=)"
            )
        check(wanted, rank, is_whole(rank), lambda rank, K=K: 1 <= rank <= K)
        if resolved.setdefault(name, int(rank)) != rank:
            raise ValueError(f"ranks gives layer {name!r} two ranks, by two names: {resolved[name]}, {rank}")
    for name, others in shared.items():
        apart = [other for other in others if name in resolved and resolved.get(other) != resolved[name]]
        if apart:
            raise ValueError(f"layers {name!r} and {apart[0]!r} share one weight; give both the same rank")
        if name in resolved and any(unfolding[name] != unfolding[other] for other in others):
            raise ValueError(f"layer {name!r} shares its weight; give all that do the same unfolding")
    return resolved


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer: its rank, the share of energy its kept values held, the action and why."""

    name: str
    rank: int | None  # None: the layer is dense
    energy_kept: float  # Σ_{i≤R} s_i² / E before energy transfer, 0 to 1; NaN where nothing was measured
    action: str  # projected | left alone | dense | factorized | constant
    reason: str = ""  # for a projected layer "followed" where the fast path was taken
    unfolding: str = "rows"  # of the matrix that has the rank


class Report(LayerTable, list):
    """The list of :class:`LayerReport` that a projection or a factorization returns; it prints as a table.

    >>> layers = LayerReport("conv", 6, 0.9, "projected"), LayerReport("stem", None, math.nan, "dense")
    >>> print(Report(layers))
    layer  rank  energy kept  what       why
    conv   6     0.9000       projected
    stem                      dense
    1 projected, 1 dense; energy kept: 0.9000 on average, 0.9000 at least
    """

    @property
    def layers(self) -> list[LayerReport]:
        """The rows."""
        return self

    def cells(self) -> list[tuple[str, ...]]:
        """Return the header, then what is shown of each layer."""
        table = [("layer", "rank", "energy kept", "what", "why")]
        for layer in self:
            kept = "" if math.isnan(layer.energy_kept) else f"{layer.energy_kept:.4f}"
            rank = "" if layer.rank is None else str(layer.rank)
            table.append((layer.name, rank, kept, layer.action, layer.reason))
        return table

    def footer(self) -> str:
        """Return how many layers were treated how, and how much energy they kept."""
        counts = Counter(layer.action for layer in self)
        text = ", ".join(f"{count} {action}" for action, count in counts.items()) or "nothing so far"
        kept = self._energy_kept()
        if kept:
            mean, least = statistics.fmean(kept.values()), min(kept.values())
            text += f"; energy kept: {mean:.4f} on average, {least:.4f} at least"
        return text

    def _energy_kept(self) -> dict[str, float]:
        return {layer.name: layer.energy_kept for layer in self if not math.isnan(layer.energy_kept)}

    def metrics(self) -> dict[str, float]:
        """Return it as a flat dict of numbers, as TensorBoard and other loggers take them.

        They are: how many layers were treated how; the share of energy kept, on average and at least; that of
        each layer, and its rank.

        >>> for name, value in Report([LayerReport("conv", 6, 0.9, "projected")]).metrics().items():
        ...     print(name, value)
        layers_projected 1
        energy_kept_mean 0.9
        energy_kept_min 0.9
        energy_kept/conv 0.9
        rank/conv 6
        """
        kept = self._energy_kept()
        metrics = dict(Counter(f"layers_{layer.action.replace(' ', '_')}" for layer in self))
        if kept:
            metrics["energy_kept_mean"] = statistics.fmean(kept.values())
            metrics["energy_kept_min"] = min(kept.values())
        metrics |= {f"energy_kept/{name}": share for name, share in kept.items()}
        return metrics | {f"rank/{layer.name}": layer.rank for layer in self if layer.rank is not None}
