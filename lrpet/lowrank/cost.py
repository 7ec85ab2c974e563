"""Multiply-adds and parameters, as arithmetic on layer shapes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lrpet.lowrank.ranks import resolve_ranks

__all__ = ["Cost", "LayerCost", "cost"]


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer for one image: as it would be deployed, and dense."""

    name: str
    kind: str  # Conv2d or Linear
    N: int  # outputs
    D: int  # inputs times kernel area (of one group)
    rank: int | None  # None: dense
    macs: int
    params: int
    dense_macs: int
    dense_params: int

    @property
    def note(self) -> str:
        """Say where the factors cost more than the dense layer, R·(N + D) ≥ N·D; empty elsewhere."""
        return (
            "factors cost no less than the dense layer"
            if self.rank is not None and self.macs >= self.dense_macs
            else ""
        )


@dataclass(frozen=True)
class Cost:
    """Cost of a network for one image. One MAC is one multiply-add, which the literature calls a FLOP."""

    macs: int
    params: int
    dense_macs: int
    dense_params: int
    layers: tuple[LayerCost, ...]


def cost(
    model: nn.Module, input_shape: Sequence[int], ranks: Mapping[str, int] | Sequence[int] | None = None
) -> Cost:
    """Count multiply-adds and parameters of a network, dense or factorized at the given ranks.

    A layer of N outputs and D inputs that runs at P positions costs N·D·P multiply-adds dense and
    R·(N + D)·P factorized; its weights N·D and R·(N + D). Convolutions and Linear layers count;
    BatchNorm, pooling and activations do not (their parameters do). The rank min(N, D) is dense.

    Args:
        model: any module; it is run once on the "meta" device, which computes shapes only.
        input_shape: (C, H, W) of one image.
        ranks: layer name → R or a list in module order; None counts the model as it is.

    Returns:
        Totals and a row a layer, in the order of execution.

    Raises:
        ValueError: ranks or an image size that do not fit the model.

    Source: the authors' counts; ResNet-56 at ratio 0.57 is 56.06 M of 125.49 M.

    >>> cost(nn.Conv2d(3, 16, 3, padding=1, bias=False), (3, 32, 32)).macs
    442368
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be a torch.nn.Module; got {type(model).__name__} {model!r}; build_model makes one of a name"
        )
    ranks = {} if ranks is None else resolve_ranks(model, ranks)
    shadow = copy.deepcopy(model).to("meta").eval()
    names = {module: name for name, module in shadow.named_modules()}
    macs: dict[str, int] = {}

    def record(module, _inputs, output):
        positions = output.numel() // module.weight.shape[0]
        macs[names[module]] = macs.get(names[module], 0) + module.weight.numel() * positions

    for module in names:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(record)
    try:
        with torch.no_grad():
            shadow(torch.empty(1, *input_shape, device="meta"))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"input_shape must be (C, H, W) of an image that {type(model).__name__} takes; got {input_shape!r}: {error}"
        ) from error

    modules = dict(shadow.named_modules())
    layers = []
    for name, dense_macs in macs.items():
        module = modules[name]
        N, D = module.weight.shape[0], module.weight[0].numel()
        rank = ranks.get(name)
        rank = None if rank == min(N, D) else rank
        weights = N * D if rank is None else rank * (N + D)
        bias = 0 if module.bias is None else N
        layers.append(
            LayerCost(
                name,
                type(module).__name__,
                N,
                D,
                rank,
                dense_macs // (N * D) * weights,
                weights + bias,
                dense_macs,
                N * D + bias,
            )
        )
    dense_params = sum(p.numel() for p in shadow.parameters())
    return Cost(
        macs=sum(layer.macs for layer in layers),
        params=dense_params + sum(layer.params - layer.dense_params for layer in layers),
        dense_macs=sum(layer.dense_macs for layer in layers),
        dense_params=dense_params,
        layers=tuple(layers),
    )
