"""A rank for each layer: from one ratio for all, or from a list."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType

from torch import nn

__all__ = ["LayerReport", "compressible_layers", "rank_from_ratio", "ranks_from_ratio", "resolve_ranks"]


def compressible_layers(model: nn.Module, layers: str | None = None) -> dict[str, tuple[int, int]]:
    """Return the layers that can be made low-rank, with the shape (N, D) of their weight as a matrix.

    Every ``Conv2d`` with one group counts; grouped and depthwise convolutions stay dense. Linear layers
    count on request: the paper leaves the classifier of a CNN dense.

    Args:
        model: any module.
        layers: None for all convolutions; else a pattern, as ``*.mlp.*`` or ``*``, and of all convolutions and
            Linear layers those whose name matches count.

    >>> compressible_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2)))
    {'0': (8, 27)}
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be a torch.nn.Module; got {type(model).__name__} {model!r}; build_model makes one of a name"
        )
    if not isinstance(layers, (str, NoneType)):
        raise ValueError(f"layers must be null or a pattern of layer names, as '*.mlp.*'; got {layers!r}")
    shapes = {}
    for name, module in model.named_modules():
        convolution = isinstance(module, nn.Conv2d) and module.groups == 1
        if (
            convolution
            if layers is None
            else (convolution or isinstance(module, nn.Linear)) and fnmatch.fnmatchcase(name, layers)
        ):
            shapes[name] = (module.weight.shape[0], module.weight[0].numel())
    return shapes


def rank_from_ratio(K: int, prune_ratio: float) -> int:
    """Return R = int(K − K·ρ), at least 1.

    Args:
        K: min(N, D), the number of singular values.
        prune_ratio: ρ in [0, 1), the share that is removed.

    Raises:
        ValueError: the ratio is outside [0, 1).

    Source: the authors' code; truncation toward zero in double precision.

    >>> [rank_from_ratio(K, 0.57) for K in (16, 32, 64)]
    [6, 13, 27]
    """
    if isinstance(K, bool) or not isinstance(K, int) or K < 1:
        raise ValueError(f"K is the number of singular values, a whole number of 1 or more; got {K!r}")
    if isinstance(prune_ratio, bool) or not isinstance(prune_ratio, (int, float)) or not 0 <= prune_ratio < 1:
        raise ValueError(
            f"prune_ratio is the share of singular values to remove, 0 ≤ ratio < 1; got {prune_ratio!r}"
        )
    return max(1, int(K - K * float(prune_ratio)))


def ranks_from_ratio(model: nn.Module, prune_ratio: float, *, layers: str | None = None) -> dict[str, int]:
    """Return the rank of every compressible layer for one prune ratio.

    Args:
        model: any module; see :func:`compressible_layers` for which layers count.
        prune_ratio: ρ in [0, 1).
        layers: None for all convolutions; else a pattern of names, for Linear layers too, as ``*.mlp.*``.

    Returns:
        Layer name → R, in module order.

    Raises:
        ValueError: the ratio is out of range, or no layer can be compressed.

    Source: the paper's uniform setting, arXiv 2204.05566, experimental settings.

    >>> ranks_from_ratio(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3)), 0.57)
    {'0': 6, '2': 13}
    """
    shapes = compressible_layers(model, layers)
    if not shapes:
        raise ValueError(
            f"{type(model).__name__} has no layer to compress: no Conv2d with one group, or none whose name matches layers={layers!r}"
        )
    return {name: rank_from_ratio(min(shape), prune_ratio) for name, shape in shapes.items()}


def resolve_ranks(model: nn.Module, ranks: Mapping[str, int] | Sequence[int]) -> dict[str, int]:
    """Check ranks against a model; a plain list is matched to the compressible convolutions in module order.

    Args:
        model: the network.
        ranks: layer name → R (any subset; the others stay dense), or one R for each compressible convolution.

    Returns:
        Layer name → R.

    Raises:
        ValueError: unknown or grouped layer, wrong length, or a rank outside 1 … min(N, D).

    Source: the list form is how the authors print searched ranks.

    >>> resolve_ranks(nn.Sequential(nn.Conv2d(3, 16, 3)), [6])
    {'0': 6}
    """
    if not isinstance(ranks, Mapping):
        if not isinstance(ranks, Sequence) or isinstance(ranks, str):
            raise ValueError(
                f"ranks must be a list of whole numbers or a map of layer names to them; got {ranks!r}; ranks_from_ratio makes one"
            )
        names = list(compressible_layers(model))
        if len(ranks) != len(names):
            raise ValueError(
                f"ranks has {len(ranks)} entries, but the model has {len(names)} compressible convolutions"
            )
        ranks = dict(zip(names, ranks, strict=True))
    shapes = compressible_layers(model, "*")
    modules = dict(model.named_modules())
    for name, rank in ranks.items():
        if name not in modules:
            raise ValueError(
                f"ranks names a layer {name!r} that the model does not have; it has {', '.join(list(shapes)[:5])}, …"
            )
        if name not in shapes:
            raise ValueError(
                f"layer {name!r} ({type(modules[name]).__name__}) cannot be made low-rank; only Conv2d with one group and Linear can"
            )
        K = min(shapes[name])
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= K:
            raise ValueError(f"rank of layer {name!r} must be an integer from 1 to {K}; got {rank!r}")
    return dict(ranks)


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer: its rank, the share of energy its kept values held, the action and why."""

    name: str
    rank: int | None  # None: the layer is dense
    energy_kept: float  # Σ_{i≤R} s_i² / E before energy transfer, 0 to 1; NaN where nothing was measured
    action: str  # projected | left alone | dense | factorized | constant
    reason: str = ""  # for a projected layer "followed" where the fast path was taken
