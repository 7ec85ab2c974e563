"""Which BatchNorm consumes the output of which layer, and the two merged for inference."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping

import torch
import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lrpet.lowrank.factors import ConstantOutput

__all__ = ["batchnorm_scale", "find_batchnorms", "fold_batchnorm", "normalized_weights", "resolve_batchnorms"]
LAYERS = (nn.Conv2d, nn.Linear, ConstantOutput)


def find_batchnorms(model: nn.Module) -> dict[str, str | None]:
    """Follow the graph from every convolution and Linear layer to the BatchNorm that consumes its output.

    A pair counts only when the two can be merged: the layer runs once and its output goes to that
    BatchNorm and nowhere else (``nn.Identity`` in between is looked through).

    Args:
        model: any module that torch.fx can trace.

    Returns:
        Layer name → BatchNorm name, or None where no BatchNorm follows; in the order of execution.

    Raises:
        ValueError: torch.fx cannot trace the model; state the pairs yourself then.

    Source: arXiv 2204.05566, BN rectification; torch.fx for the graph.

    >>> find_batchnorms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)))
    {'0': '1', '2': None}
    """

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, qualified_name):
            return isinstance(module, ConstantOutput) or super().is_leaf_module(module, qualified_name)

    try:
        graph = Tracer().trace(model)
    except Exception as error:  # tracing runs the user's forward, which can raise anything
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error}). Pass batchnorms={{layer name: "
            "BatchNorm name or None}}, or switch BN rectification off."
        ) from error
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    modules = dict(model.named_modules())
    pairs: dict[str, str | None] = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], LAYERS):
            pairs[node.target] = None if calls[node.target] > 1 else _sole_batchnorm(node, modules, calls)
    return pairs


def _sole_batchnorm(node, modules, calls) -> str | None:
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op != "call_module":
            return None
        if isinstance(modules[node.target], _BatchNorm):
            return node.target if calls[node.target] == 1 else None
        if not isinstance(modules[node.target], nn.Identity):
            return None
    return None


def resolve_batchnorms(
    model: nn.Module, layers, batchnorms: Mapping[str, str | None] | None = None
) -> dict[str, str | None]:
    """Return the BatchNorm of each named layer, from the graph or, checked against it, from the caller.

    Args:
        model: the network.
        layers: names of the layers to pair.
        batchnorms: layer name → BatchNorm name or None; None to read everything off the graph.

    Returns:
        Layer name → BatchNorm name or None, for every name in ``layers``.

    Raises:
        ValueError: a name that is not in the model, a BatchNorm of another width, or a stated pair that
            the graph contradicts. The text names both modules.

    Source: arXiv 2204.05566, BN rectification.

    >>> resolve_batchnorms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), ["0"])
    {'0': '1'}
    """
    if batchnorms is None:
        has_any = any(isinstance(module, _BatchNorm) for module in model.modules())
        found = find_batchnorms(model) if has_any else {}  # a LayerNorm network need not be traceable
        pairs = {name: found.get(name) for name in layers}
    else:
        missing = [name for name in layers if name not in batchnorms]
        if missing:
            raise ValueError(
                f"batchnorms says nothing about layer {missing[0]!r}; give its BatchNorm's name, or None"
            )
        pairs = {name: batchnorms[name] for name in layers}
        try:
            found = find_batchnorms(model)
        except ValueError:
            found = pairs  # no graph to compare with: the widths below are all that can be checked
        for name, bn in pairs.items():
            if bn != found.get(name):
                raise ValueError(
                    f"layer {name!r} is paired with BatchNorm {bn!r}, but in the graph it feeds {found.get(name)!r}"
                )
    modules = dict(model.named_modules())
    for name, bn in pairs.items():
        if not isinstance(modules.get(name), LAYERS):
            raise ValueError(
                f"batchnorms names {name!r}, which is not a layer of this model that can be paired with a BatchNorm"
            )
        if bn is None:
            continue
        if not isinstance(modules.get(bn), _BatchNorm):
            raise ValueError(f"layer {name!r} is paired with {bn!r}, which is not a BatchNorm of this model")
        width = (
            modules[name].weight.shape[0] if hasattr(modules[name], "weight") else modules[name].bias.shape[0]
        )
        if modules[bn].num_features != width:
            raise ValueError(
                f"layer {name!r} has {width} outputs, but its BatchNorm {bn!r} has {modules[bn].num_features} features"
            )
        if modules[bn].running_var is None:
            raise ValueError(
                f"BatchNorm {bn!r} behind layer {name!r} keeps no running statistics, which rectification and folding need"
            )
    return pairs


def normalized_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that a BatchNorm follows: in training, scaling such a weight changes nothing that the network computes.

    Of a factorized layer these are both factors, of a parametrized one all that its weight is made of.

    Raises:
        ValueError: the model has BatchNorms, and torch.fx cannot trace it.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    >>> [tuple(weight.shape) for weight in normalized_weights(model)]
    [(8, 3, 3, 3)]
    """
    pairs = (
        find_batchnorms(model) if any(isinstance(module, _BatchNorm) for module in model.modules()) else {}
    )
    factorized = {
        report.name for report in getattr(model, "factorization", ()) if report.action == "factorized"
    }
    followed = [name for name, bn in pairs.items() if bn is not None]
    wholes = [whole if (whole := name.rpartition(".")[0]) in factorized else name for name in followed]
    parts = [part for name in wholes for part in model.get_submodule(name).named_parameters()]
    return [parameter for name, parameter in parts if not name.endswith("bias")]


def batchnorm_scale(*batchnorms: nn.Module) -> torch.Tensor:
    """Return a = γ / sqrt(running_var + eps): the factor each BatchNorm applies to each row in eval mode.

    Args:
        batchnorms: B modules of one width N.

    Returns:
        (B, N), float64.

    >>> batchnorm_scale(nn.BatchNorm2d(2, eps=0.0))
    tensor([[1., 1.]], dtype=torch.float64)
    """
    variance = torch.stack([bn.running_var for bn in batchnorms]).double()  # (B, N)
    a = (variance + variance.new_tensor([bn.eps for bn in batchnorms]).unsqueeze(1)).rsqrt()
    ones = torch.ones_like(batchnorms[0].running_var)
    return a * torch.stack([ones if bn.weight is None else bn.weight.detach() for bn in batchnorms])


@torch.no_grad()
def fold_batchnorm(model: nn.Module, batchnorms: Mapping[str, str | None] | None = None) -> nn.Module:
    """Return a copy for inference in which each BatchNorm is merged into the layer before it.

    With a = γ / sqrt(running_var + eps) the layer's weight becomes diag(a)·M and its bias
    a·(bias − running_mean) + β; in a factorized layer the second factor takes both.

    Args:
        model: dense or compact network; it is not changed.
        batchnorms: layer name → BatchNorm name or None, for models that torch.fx cannot trace.

    Returns:
        A new module in eval mode, with ``nn.Identity`` where a BatchNorm was.

    Raises:
        ValueError: the model cannot be traced and no pairs are given, or a pair is wrong.

    Source: arXiv 2204.05566, BN rectification rests on this identity.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    >>> x = torch.rand(1, 3, 8, 8)
    >>> torch.allclose(fold_batchnorm(model)(x), model(x), atol=1e-5)
    True
    """
    folded = copy.deepcopy(model).eval()
    layers = [name for name, module in folded.named_modules() if isinstance(module, LAYERS)]
    for name, bn_name in resolve_batchnorms(
        folded, batchnorms if batchnorms is not None else layers, batchnorms
    ).items():
        if bn_name is None:
            continue
        layer, bn = folded.get_submodule(name), folded.get_submodule(bn_name)
        a = batchnorm_scale(bn)[0]  # (N,)
        bias = 0.0 if layer.bias is None else layer.bias.double()
        bias = a * (bias - bn.running_mean.double()) + (0.0 if bn.bias is None else bn.bias.double())
        if not isinstance(layer, ConstantOutput):
            weight = layer.weight.double() * a.reshape(-1, *[1] * (layer.weight.ndim - 1))
            layer.weight.copy_(weight)
        like = layer.bias if layer.bias is not None else layer.weight
        layer.bias = nn.Parameter(bias.to(like.dtype), requires_grad=like.requires_grad)
        folded.set_submodule(bn_name, nn.Identity())
    folded.batchnorm_folded = True
    return folded
