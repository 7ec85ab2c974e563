"""What a layer is that can be made low-rank, decided once: type, weight as a matrix, or why it is left out.

Also what has to be known about the model around it: what wraps it, what it shares, and how a module is copied
or replaced.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import re
from collections import defaultdict
from collections.abc import Container, Mapping

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from lrpet.lowrank.arguments import check

__all__ = [
    "canonical_names",
    "copy_of",
    "count_parameters",
    "layer_type",
    "left_out",
    "matrix_of",
    "replace_module",
    "resolve_unfolding",
    "rows_first",
    "shared_weights",
    "unwrap",
    "unwrapped_name",
    "unwritable",
]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
UNFOLDINGS = ("rows", "columns")  # of a k×k weight: N × C·k², the paper's, or N·k² × C
KINDS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
WRAPPERS = {  # class → attribute that has the network; by name, so that no package need be there
    "AveragedModel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "DistributedDataParallel": "module",
    "ModelEmaV2": "module",  # timm
    "ModelEmaV3": "module",
    "OptimizedModule": "_orig_mod",  # torch.compile
    "_FabricModule": "_original_module",  # Lightning Fabric
}
SHARDED = ("FSDPModule", "FullyShardedDataParallel")


def layer_type(module: nn.Module) -> type | None:
    """Return the type that says what a layer computes, or None where it is no layer that is known here.

    Types are compared, not subclasses: a subclass may have a forward of its own. Hugging Face's ``Conv1D``,
    a Linear layer with its weight transposed, counts as Linear; a parametrized layer as what it was before.

    >>> layer_type(nn.Conv2d(3, 8, 3)).__name__, layer_type(nn.ReLU())
    ('Conv2d', None)
    """
    kind = parametrize.type_before_parametrizations(module)
    return kind if kind in KINDS else nn.Linear if _is_hugging_face(kind) else None


def _is_hugging_face(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def left_out(module: nn.Module) -> str:
    """Return why a convolution or Linear layer cannot be made low-rank; empty where it can, or is none.

    >>> left_out(nn.Conv2d(8, 8, 3, groups=8)), left_out(nn.Conv2d(8, 8, 3))
    ('grouped', '')
    """
    kind = layer_type(module)
    if kind is None:
        base = next((base for base in KINDS if isinstance(module, base)), None)
        if isinstance(module, LazyModuleMixin):
            return "it has no shape yet; run the model once on an input"
        if base is None and not isinstance(module, _ConvNd):
            return ""
        known = base.__name__ if base else "a convolution"
        return f"{type(module).__name__} is a subclass of {known} and may compute something else"
    if getattr(module, "groups", 1) > 1:
        return "grouped"
    if module.weight.ndim != (2 if kind is nn.Linear else len(module.kernel_size) + 2):
        return f"its weight has the shape {tuple(module.weight.shape)}, as a shard of FSDP has; unshard it"
    return ""


def unwritable(module: nn.Module) -> str:
    """Return why the weight of a layer cannot be replaced by another, and what to do; empty where it can.

    >>> unwritable(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))[:53]
    'its weight is computed from other parameters at each '
    """
    for part in ("weight", "bias"):
        if part not in module._parameters:
            return (
                f"its {part} is computed from other parameters at each use (parametrization, weight norm, "
                "spectral norm or pruning mask); remove that first, by "
                "torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
                "remove_spectral_norm or prune.remove"
            )
    weight = module._parameters["weight"]
    if weight.is_meta:
        return "its weight is on the meta device and has no values; load it first"
    if type(weight) is not nn.Parameter:
        kind = type(weight).__name__
        return f"its weight is a {kind}, such as a shard of FSDP or a quantized weight; gather it first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    return ""


def rows_first(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a view of a weight of this layer whose first dimension counts the outputs, (N, ...).

    >>> rows_first(layer := nn.ConvTranspose2d(4, 8, 3), layer.weight).shape
    torch.Size([8, 4, 3, 3])
    """
    transposed = isinstance(layer, _ConvTransposeNd) or _is_hugging_face(
        parametrize.type_before_parametrizations(layer)
    )
    return weight.transpose(0, 1) if transposed else weight


def matrix_of(layer: nn.Module, unfolding: str = "rows") -> Tensor:
    """Return the weight of a layer as a matrix, (N, D): N outputs, D inputs times kernel area.

    Args:
        layer: a convolution or Linear layer.
        unfolding: "rows", or "columns" for (N·k², C): a row for each output n and place (i, j) of the window.

    >>> matrix_of(nn.Conv2d(3, 8, 3)).shape, matrix_of(nn.Conv2d(3, 8, 3), "columns").shape
    (torch.Size([8, 27]), torch.Size([72, 3]))
    """
    rows = rows_first(layer, layer.weight)
    return rows.flatten(1) if unfolding == "rows" else rows.movedim(1, -1).flatten(0, -2)


def resolve_unfolding(model: nn.Module, unfolding: str | Mapping[str, str]) -> dict[str, str]:
    """Return the unfolding of every layer; of one without a window, whose two matrices are one, "rows".

    Args:
        model: the network.
        unfolding: "rows" or "columns" for all layers, or a map of names or patterns of names to them; a name
            counts before a pattern, and layers that none fits are "rows".

    Raises:
        TypeError: it is neither a text nor a mapping.
        ValueError: a name that fits no layer, another unfolding, or two patterns that say different things.

    >>> resolve_unfolding(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)), "columns")
    {'0': 'columns', '1': 'rows'}
    """
    layers = {name: layer for name, layer in unwrap(model).named_modules() if layer_type(layer)}
    allowed = "unfolding must be 'rows', 'columns' or a map of layer names to them"
    check(allowed, unfolding, isinstance(unfolding, (str, Mapping)))
    if isinstance(unfolding, str):
        check(allowed, unfolding, right_type=True, allowed=UNFOLDINGS.__contains__)
        stated = dict.fromkeys(layers, {unfolding})
    else:
        first, stated = canonical_names(unwrap(model)), {}
        exact = {unwrapped_name(name, first): how for name, how in unfolding.items()}
        for given, how in exact.items():
            check(allowed, how, isinstance(how, str), UNFOLDINGS.__contains__)
            fitting = [first[given]] if given in first else fnmatch.filter(layers, given)
            if not layers.keys() & fitting:
                raise ValueError(f"unfolding names {given!r}, which fits no layer of this model")
            for name in fitting:
                stated.setdefault(name, set()).add(how)
        stated |= {first[name]: {how} for name, how in exact.items() if name in first}
        if unclear := [name for name, hows in stated.items() if len(hows) > 1]:
            raise ValueError(f"unfolding has two patterns that fit layer {unclear[0]!r} and differ; name it")
    resolved = {}
    for name, layer in layers.items():
        has_window = math.prod(getattr(layer, "kernel_size", ())) > 1 and layer.groups == 1
        resolved[name] = min(stated.get(name, {"rows"})) if has_window else "rows"
    return resolved


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model, shared ones once, those without a shape yet not.

    >>> count_parameters(nn.Linear(2, 3))
    9
    """
    return sum(p.numel() for p in model.parameters() if not isinstance(p, UninitializedParameter))


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside DistributedDataParallel, AveragedModel, torch.compile and others.

    They are those of ``WRAPPERS``; what accelerate prepares is one of them, or the network itself.

    Raises:
        TypeError: this is no module.
        ValueError: the network is sharded by FSDP.

    >>> unwrap(nn.DataParallel(nn.Linear(2, 3)))
    Linear(in_features=2, out_features=3, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module; got {type(model).__name__} {model!r}; build_model makes "
            "one of a name"
        )
    inside = model
    while isinstance(inside, nn.Module):
        model = inside
        wrapper = next((name for name in _class_names(model) if name in WRAPPERS), None)
        inside = wrapper and getattr(model, WRAPPERS[wrapper], None)
    for name, module in model.named_modules():
        if sharded := next((kind for kind in _class_names(module) if kind in SHARDED), None):
            raise ValueError(
                f"{repr(name) if name else 'the network'} ({type(module).__name__}) is sharded by FSDP "
                f"({sharded}): no process has its whole weights. Work on an unsharded copy of the network: "
                "bring its weights there and back by get_model_state_dict and set_model_state_dict of "
                "torch.distributed.checkpoint.state_dict, with StateDictOptions(full_state_dict=True)"
            )
    return model


def _class_names(module: nn.Module) -> list[str]:
    return [kind.__name__ for kind in type(module).__mro__]


def unwrapped_name(name: str, known: Container[str]) -> str:
    """Return a name as it is in the network inside a wrapper: without "module." and the like in front.

    Args:
        name: of a module, as the wrapper or the network has it.
        known: the names that the network has, of which none is changed.

    >>> unwrapped_name("module._orig_mod.conv", {"conv"}), unwrapped_name("module", {"module"})
    ('conv', 'module')
    """
    if not isinstance(name, str) or name in known:
        return name
    return re.sub(r"^((module|_orig_mod|_original_module|_forward_module)\.)+", "", name)


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Return each name of each module → its first name; the two differ where a module is registered twice.

    >>> layer = nn.Linear(2, 2)
    >>> canonical_names(nn.Sequential(layer, layer))
    {'': '', '0': '0', '1': '0'}
    """
    first: dict[nn.Module, str] = {}
    return {
        name: first.setdefault(module, name) for name, module in model.named_modules(remove_duplicate=False)
    }


def shared_weights(model: nn.Module) -> dict[str, list[str]]:
    """Return the name of each layer whose weight other modules have too → the names of those modules.

    >>> model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10)})
    >>> model["head"].weight = model["embed"].weight
    >>> shared_weights(model)
    {'head': ['embed']}
    """
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and name not in owners[id(parameter)]:
                owners[id(parameter)].append(name)
    shared = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if layer_type(module) else None
        if weight is not None and len(owners[id(weight)]) > 1:
            shared[name] = [other for other in owners[id(weight)] if other != name]
    return shared


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put a module in the place of another, under all its names; return the model, for "" ``new`` itself.

    >>> replace_module(nn.Sequential(nn.Linear(2, 2)), "0", nn.ReLU())
    Sequential(
      (0): ReLU()
    )
    """
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old:
                parent._modules[child] = new
    return new if model is old else model


def copy_of(model: nn.Module, *, meta: bool = False) -> nn.Module:
    """Return a deep copy of a model; activations in it are detached, what cannot be copied (a lock) shared.

    Args:
        model: any module.
        meta: let parameters and buffers of the copy have shapes only, on the "meta" device.

    >>> copy_of(nn.Linear(2, 2), meta=True).weight.device
    device(type='meta')
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()) if meta else ():
            if isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
            elif tensor is not None:
                memo[id(tensor)] = tensor.detach().to("meta")
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception:  # whatever an attribute raises; find which
        for module in model.modules():
            for key, value in vars(module).items():
                if key not in ("_parameters", "_buffers", "_modules"):
                    try:
                        copy.deepcopy(value, dict(memo))
                    except Exception:
                        memo[id(value)] = value
        return copy.deepcopy(model, memo)
