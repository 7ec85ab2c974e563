"""Which BatchNorm consumes the output of which layer, and the two merged for inference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrpet.lowrank.arguments import check
from lrpet.lowrank.factors import ConstantOutput, whole_layer
from lrpet.lowrank.layers import (
    TRANSPOSED,
    canonical_names,
    copy_of,
    layer_type,
    matrix_of,
    replace_module,
    rows_first,
    unwrap,
    unwrapped_name,
)
from lrpet.lowrank.observe import call, watching

__all__ = [
    "batchnorm_scale",
    "find_batchnorms",
    "fold_batchnorm",
    "is_batchnorm",
    "normalized_weights",
    "resolve_batchnorms",
]


def is_batchnorm(module: nn.Module) -> bool:
    """Tell whether a module is a BatchNorm, which scales each channel by a fixed number in evaluation.

    >>> is_batchnorm(nn.BatchNorm2d(8)), is_batchnorm(nn.GroupNorm(2, 8))
    (True, False)
    """
    # of torchvision and detectron2
    frozen = type(module).__name__ == "FrozenBatchNorm2d" and hasattr(module, "eps")
    return isinstance(module, _BatchNorm) or frozen


def _is_plain(bn: nn.Module) -> bool:
    """Tell whether a BatchNorm does nothing else; timm's BatchNormAct2d has an activation inside."""
    plain = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return type(bn).forward in plain or not isinstance(bn, _BatchNorm)


def _can_be_paired(module: nn.Module) -> bool:
    return layer_type(module) is not None or isinstance(module, ConstantOutput)


def find_batchnorms(model: nn.Module, example_inputs: Any = None) -> dict[str, str | None]:
    """Find the BatchNorm that consumes the output of each convolution and Linear layer.

    A pair counts only where the two can be merged, that is, where the layer runs once and its output goes to
    that BatchNorm and nowhere else (``nn.Identity`` in between is looked through), which scales the same
    dimension. BatchNorm1d scales the second dimension, a Linear layer makes the last; without a run, those
    two are a pair only after ``Flatten``.

    Args:
        model: any module; without ``example_inputs`` one that torch.fx can trace.
        example_inputs: a tensor, a tuple or a dict to run the model on once, in evaluation mode; None to read
            its graph.

    Returns:
        Layer name → BatchNorm name, or None where no BatchNorm follows; in the order of execution.

    Raises:
        ValueError: torch.fx cannot trace the model; give example inputs, or state the pairs yourself.

    Source: arXiv 2204.05566, BN rectification; torch.fx for the graph.

    >>> find_batchnorms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)))
    {'0': '1', '2': None}
    """
    model = unwrap(model)
    return _pairs_of_graph(model)[0] if example_inputs is None else _pairs_of_run(model, example_inputs)


def _pairs_of_run(model: nn.Module, example_inputs: Any) -> dict[str, str | None]:
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # by id; an output is kept so that no other gets its id
    uses, calls, consumers = Counter(), Counter(), {}

    class CountUses(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            uses.update(id(t) for t in tree_leaves((args, kwargs)) if id(t) in made)
            return func(*args, **(kwargs or {}))

    def keep(layer, _inputs, output):
        calls[layer] += 1
        if isinstance(output, Tensor):
            made[id(output)] = (layer, output)

    def consume(bn, inputs, named):
        calls[bn] += 1
        x = next(iter((*inputs, *named.values())), None)
        if id(x) in made:
            consumers[id(x)] = bn

    with watching(model) as hooks:
        for module in names:
            if _can_be_paired(module):
                hooks.append(module.register_forward_hook(keep))
            elif is_batchnorm(module):
                hooks.append(module.register_forward_pre_hook(consume, with_kwargs=True))
        with CountUses():
            result = call(model, example_inputs)
        uses.update(id(t) for t in tree_leaves(result) if id(t) in made)
    pairs: dict[str, str | None] = {names[layer]: None for layer in calls if _can_be_paired(layer)}
    for i, bn in consumers.items():
        layer, y = made[i]
        per_output = y.ndim == (2 if layer_type(layer) is nn.Linear else _dimensions(layer))
        if per_output and uses[i] == calls[layer] == calls[bn] == 1:
            pairs[names[layer]] = names[bn]
    return pairs


def _dimensions(layer: nn.Module) -> int:
    return len(layer.kernel_size) + 2


def _pairs_of_graph(model: nn.Module) -> tuple[dict[str, str | None], dict[str, str]]:
    """Return the pairs that torch.fx shows, and those of Linear that depend on the input's dimensions."""

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, qualified_name):
            ours = _can_be_paired(module) or is_batchnorm(module)
            return ours or super().is_leaf_module(module, qualified_name)

    try:
        graph = Tracer().trace(model)
    except Exception as error:  # tracing runs the user's forward, which can raise anything
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error}). Pass "
            "batchnorms={layer name: BatchNorm name or None}, example_inputs= to read the pairs off one run, "
            "or switch BN rectification off."
        ) from error
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    modules = dict(model.named_modules())
    pairs, unsure = {}, {}
    for node in graph.nodes:
        if node.op == "call_module" and _can_be_paired(modules[node.target]):
            bn = None if calls[node.target] > 1 else _sole_batchnorm(node, modules, calls)
            if bn and layer_type(modules[node.target]) is nn.Linear and not _is_matrix(node, modules):
                unsure[node.target], bn = bn, None
            pairs[node.target] = bn
    return pairs, unsure


def _sole_batchnorm(node, modules, calls) -> str | None:
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op != "call_module":
            return None
        if is_batchnorm(modules[node.target]):
            return node.target if calls[node.target] == 1 else None
        if not isinstance(modules[node.target], nn.Identity):
            return None
    return None


def _is_matrix(node, modules) -> bool:
    """Tell whether a value surely has two dimensions: after Flatten, elementwise and Linear modules only."""
    keep = (
        nn.Linear,
        nn.BatchNorm1d,
        nn.Identity,
        nn.Dropout,
        nn.ReLU,
        nn.GELU,
        nn.SiLU,
        nn.Tanh,
        nn.Sigmoid,
    )
    while node.op == "call_module" and type(modules[node.target]) in keep:
        node = node.args[0]
    if node.op == "call_module":
        flatten = modules[node.target]
        return type(flatten) is nn.Flatten and (flatten.start_dim, flatten.end_dim) == (1, -1)
    return node.target in (torch.flatten, "flatten") and node.args[1:] == (1,)


def resolve_batchnorms(
    model: nn.Module, layers, batchnorms: Mapping[str, str | None] | None = None, example_inputs: Any = None
) -> dict[str, str | None]:
    """Return the BatchNorm of each named layer: found, or stated and checked against what is found.

    Args:
        model: the network.
        layers: names of the layers to pair.
        batchnorms: layer name → BatchNorm name or None; None to find the pairs.
        example_inputs: see :func:`find_batchnorms`.

    Returns:
        Layer name → BatchNorm name or None, for every name in ``layers``.

    Raises:
        TypeError: ``batchnorms`` is no mapping.
        ValueError: a name that is not in the model, a BatchNorm of another width, or a stated pair that
            the graph contradicts. The text names both modules.

    Source: arXiv 2204.05566, BN rectification.

    >>> resolve_batchnorms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), ["0"])
    {'0': '1'}
    """
    model = unwrap(model)
    if batchnorms is None:
        has_any = any(is_batchnorm(module) for module in model.modules())
        found = find_batchnorms(model, example_inputs) if has_any else {}  # without any it need not trace
        pairs = {name: found.get(name) for name in layers}
    else:
        wanted = "batchnorms must map the name of each layer to that of its BatchNorm, or None"
        check(wanted, batchnorms, isinstance(batchnorms, Mapping))
        first = canonical_names(model)
        layers = [unwrapped_name(name, first) for name in layers]
        batchnorms = {
            unwrapped_name(name, first): unwrapped_name(bn, first) for name, bn in batchnorms.items()
        }
        missing = [name for name in layers if name not in batchnorms]
        if missing:
            raise ValueError(
                f"batchnorms says nothing about layer {missing[0]!r}; give its BatchNorm's name, or None"
            )
        pairs = {first.get(name, name): first.get(bn, bn) for name in layers for bn in [batchnorms[name]]}
        unsure = {}
        try:
            if example_inputs is None:
                found, unsure = _pairs_of_graph(model)
            else:
                found = _pairs_of_run(model, example_inputs)
        except ValueError:
            found = pairs  # no graph to compare with: the widths below are all that can be checked
        for name, bn in pairs.items():
            if bn not in (found.get(name), unsure.get(name, found.get(name))):
                raise ValueError(
                    f"layer {name!r} is paired with BatchNorm {bn!r}, but in the graph it feeds "
                    f"{found.get(name)!r}"
                )
    _check_pairs(model, pairs)
    return pairs


def _check_pairs(model: nn.Module, pairs: Mapping[str, str | None]) -> None:
    modules = dict(model.named_modules())
    for name, bn in pairs.items():
        if name not in modules or not _can_be_paired(modules[name]):
            raise ValueError(
                f"batchnorms names {name!r}, which is not a layer of this model that a BatchNorm can follow"
            )
        if bn is None:
            continue
        if bn not in modules or not is_batchnorm(modules[bn]):
            raise ValueError(f"layer {name!r} is paired with {bn!r}, which is not a BatchNorm of this model")
        if modules[bn].running_var is None:
            raise ValueError(
                f"BatchNorm {bn!r} after layer {name!r} keeps no running statistics, which rectification and "
                "folding need"
            )
        layer = modules[name]
        width = len(layer.bias) if isinstance(layer, ConstantOutput) else matrix_of(layer).shape[0]
        features = len(modules[bn].running_var)
        if features != width:
            raise ValueError(
                f"layer {name!r} has {width} outputs, but its BatchNorm {bn!r} has {features} features"
            )


def normalized_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that a BatchNorm follows: in training, scaling one changes no output of the network.

    Of a factorized layer these are both factors, of a parametrized one all that its weight is made of.

    Raises:
        ValueError: the model has BatchNorms, and torch.fx cannot trace it.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    >>> [tuple(weight.shape) for weight in normalized_weights(model)]
    [(8, 3, 3, 3)]
    """
    model = unwrap(model)
    pairs = find_batchnorms(model) if any(is_batchnorm(module) for module in model.modules()) else {}
    wholes = [whole_layer(model, name) for name, bn in pairs.items() if bn is not None]
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
def fold_batchnorm(
    model: nn.Module, batchnorms: Mapping[str, str | None] | None = None, *, example_inputs: Any = None
) -> nn.Module:
    """Return a copy for inference in which each BatchNorm is merged into the layer before it.

    With a = γ / sqrt(running_var + eps) the layer's weight becomes diag(a)·M and its bias a·(bias −
    running_mean) + β; in a factorized layer the second factor takes both. A BatchNorm that does more (an
    activation inside), or that follows a layer whose weight is computed at each use, stays as it is.

    Args:
        model: dense or compact network; it is not changed.
        batchnorms: layer name → BatchNorm name or None, for models that torch.fx cannot trace.
        example_inputs: a tensor, tuple or dict, to read the pairs off one run instead.

    Returns:
        A new module in eval mode, with ``nn.Identity`` where a BatchNorm was; layers keep their dtype. Its
        attribute ``folded_batchnorms`` holds the pairs.

    Raises:
        ValueError: the model cannot be traced and no pairs are given, or a pair is wrong.

    Source: arXiv 2204.05566, BN rectification rests on this identity.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    >>> x = torch.rand(1, 3, 8, 8)
    >>> torch.allclose(fold_batchnorm(model)(x), model(x), atol=1e-5)
    True
    """
    folded = copy_of(unwrap(model)).eval()
    layers = [name for name, module in folded.named_modules() if _can_be_paired(module)]
    stated = layers if batchnorms is None else batchnorms
    return fold_pairs(folded, resolve_batchnorms(folded, stated, batchnorms, example_inputs))


@torch.no_grad()
def fold_pairs(model: nn.Module, pairs: Mapping[str, str | None]) -> nn.Module:
    """Merge BatchNorms into layers in place, without a look at what feeds what; return the model.

    Raises:
        ValueError: the two of a pair cannot be merged; nothing was changed.

    >>> fold_pairs(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), {"0": "1"})[1]
    Identity()
    """
    _check_pairs(model, pairs)
    model.folded_batchnorms = {}
    for name, bn_name in pairs.items():
        if bn_name is None:
            continue
        layer, bn = model.get_submodule(name), model.get_submodule(bn_name)
        computed = "bias" not in layer._parameters or "weight" not in layer._parameters
        # whose outputs are not one dimension of the weight
        transposed_groups = layer_type(layer) in TRANSPOSED and layer.groups > 1
        if not _is_plain(bn) or (computed and not isinstance(layer, ConstantOutput)) or transposed_groups:
            continue
        a = batchnorm_scale(bn)[0]  # (N,)
        bias = 0.0 if layer.bias is None else layer.bias.double()
        bias = a * (bias - bn.running_mean.double()) + (0.0 if bn.bias is None else bn.bias.double())
        like = layer.bias if layer.bias is not None else layer.weight
        if not isinstance(layer, ConstantOutput):
            old, weight = layer.weight, layer.weight.double()
            weight = weight.clone() if weight is old else weight
            rows = rows_first(layer, weight)
            rows.mul_(a.reshape(-1, *[1] * (rows.ndim - 1)))
            # a new one: another layer may share the old
            layer.weight = nn.Parameter(weight.to(old.dtype), old.requires_grad)
        layer.bias = nn.Parameter(bias.to(like.dtype), like.requires_grad)
        replace_module(model, bn_name, nn.Identity())
        model.folded_batchnorms[name] = bn_name
    model.compressions = [*getattr(model, "compressions", ()), ("fold", dict(model.folded_batchnorms))]
    return model.eval()
