"""A projected network as a smaller one that computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lrpet.lowrank.arguments import renamed
from lrpet.lowrank.factors import record, replace_layer, symmetric_padding
from lrpet.lowrank.gains import measure_gains
from lrpet.lowrank.layers import (
    copy_of,
    layer_type,
    matrix_of,
    resolve_unfolding,
    rows_first,
    unwrap,
    unwritable,
)
from lrpet.lowrank.projection import truncated_svd
from lrpet.lowrank.ranks import LayerReport, Report, resolve_ranks

__all__ = ["DEAD_AT_FACTORIZATION", "factorize"]
DEAD_AT_FACTORIZATION = 1e-5  # largest singular value under which a layer computes nothing (authors' code)


@renamed(example="example_inputs")
@torch.no_grad()
def factorize(
    model: nn.Module,
    ranks: Mapping[str, int] | Sequence[int],
    *,
    min_gain: float | None = None,
    example_inputs: Any = None,
    unfolding: str | Mapping[str, str] = "rows",
) -> nn.Module:
    """Return a compact copy of a network: each chosen layer becomes two thinner ones.

    M = U·diag(s)·Vᵀ cut to R columns; a convolution turns into a k×k one from C to R channels with the weight
    diag(√s)·Vᵀ and the original stride, padding and dilation, and a 1×1 one from R to N with U·diag(√s) and
    the bias. With the unfolding "columns", where M is N·k² × C, the 1×1 one comes first, from C to R, then
    the k×k one from R to N with the settings and the bias. Exact except for rounding where the weight has
    rank R, the best approximation elsewhere. Layers that share a weight share factors, and a layer of two
    names is replaced under both.

    Args:
        model: the trained network; it is not changed.
        ranks: layer name → R, or one R for each compressible convolution in module order. A layer with
            R = min(N, D) stays dense; one whose largest singular value is under 1e-5 becomes its bias.
        min_gain: leave a layer dense where its factors are not at least so many times as fast, as
            :func:`measure_gains` finds on this machine: 1 for "not slower". None factorizes every layer,
            whatever it costs.
        example_inputs: a batch of inputs as in use, for ``min_gain``: a tensor, a tuple or a dict.
        unfolding: that of the projection, see :class:`lrpet.LowRankProjector`.

    Returns:
        A new module of the same dtype, device and mode; its attribute ``factorization`` is a
        :class:`Report`, which says for each layer what was done and where the factors cost more.

    Raises:
        ValueError: ranks that do not fit the model, or NaN or infinity in a weight, with the layer's name.

    Source: arXiv 2204.05566.

    >>> compact = factorize(nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)), {"0": 2})
    >>> [tuple(p.shape) for p in compact.parameters()]
    [(2, 8, 3, 3), (16, 2, 1, 1), (16,)]
    """
    if (min_gain is None) != (example_inputs is None):
        raise ValueError(
            "min_gain and example_inputs go together: gains are measured on a batch of inputs; give both or "
            "neither"
        )
    model = unwrap(model)
    unfolding = resolve_unfolding(model, unfolding)
    ranks = resolve_ranks(model, ranks, unfolding)
    for name in ranks:
        if reason := unwritable(model.get_submodule(name)):
            raise ValueError(f"layer {name!r} cannot be factorized: {reason}")
    gains = {} if min_gain is None else measure_gains(model, ranks, example_inputs, unfolding=unfolding)
    compact, made, reports = copy_of(model), {}, Report()
    for name, rank in ranks.items():
        layer = compact.get_submodule(name)
        M = matrix_of(layer, unfolding[name])  # (N, D)
        if not torch.isfinite(M).all():
            raise ValueError(f"NaN or infinity in the weight of layer {name!r}; it cannot be factorized")
        N, D = M.shape
        U, s, Vh = truncated_svd(M, rank)
        energy = M.double().square().sum().item()
        kept = s.square().sum().item() / energy if energy else 1.0
        if (
            s[0] < DEAD_AT_FACTORIZATION
            and layer_type(layer) is nn.Conv2d
            and symmetric_padding(layer) is not None
        ):
            limit = f"{s[0]:.1e} < {DEAD_AT_FACTORIZATION:.0e}"
            reason = f"dead: largest singular value {limit}; replaced by its bias"
            reports.append(LayerReport(name, 0, kept, "constant", reason))
        elif rank == min(N, D):
            reports.append(LayerReport(name, rank, 1.0, "dense", "full rank"))
        elif min_gain is not None and gains.get(name, 0.0) < min_gain:
            reason = "measured: on these inputs nothing calls it, so factors are not faster"
            if name in gains:
                reason = f"measured: factors {gains[name]:.2f} times as fast, less than {min_gain:g}"
            reports.append(LayerReport(name, rank, kept, "dense", reason))
        else:
            costly = rank * (N + D) >= N * D
            reason = f"factors cost {rank * (N + D) / (N * D):.2f} of the dense layer" if costly else ""
            reports.append(LayerReport(name, rank, kept, "factorized", reason, unfolding[name]))
        compact = replace_layer(compact, reports[-1], made)
        if reports[-1].action == "factorized":
            first, second = compact.get_submodule(name)
            rows = rows_first(first, first.weight)
            rows.copy_((s.sqrt().unsqueeze(-1) * Vh).reshape(rows.shape))
            rows = rows_first(second, second.weight).movedim(1, -1)  # (N, ..., R)
            rows.copy_((U * s.sqrt()).reshape(rows.shape))
    return record(compact, reports)
