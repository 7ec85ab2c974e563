"""Which LayerNorm or RMSNorm makes the inputs of which Linear layer, and the gain that it gives each."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from lrpet.lowrank.layers import layer_type, unwrap
from lrpet.lowrank.observe import call, watching

__all__ = ["find_norms_before", "norm_scale"]


def _has_gain(module: nn.Module) -> bool:
    """Tell whether a module scales each of its inputs by a gain of its own, right before it returns."""
    kind = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    return kind and module.weight is not None and module.weight.ndim == 1


def find_norms_before(model: nn.Module, names: Collection[str], example_inputs: Any) -> dict[str, str]:
    """Return Linear layer → the norm whose output it takes as it is, read off one run of the model.

    Args:
        model: the network.
        names: of layers to look at; others, and those that run on anything else too, are left out.
        example_inputs: a tensor, tuple or dict to run the model on.

    >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> find_norms_before(model, ["1", "3"], torch.ones(1, 4))
    {'1': '0'}
    """
    model = unwrap(model)
    paths = {module: name for name, module in model.named_modules()}
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # by id; an output is kept so that no other gets its id
    found: dict[str, set[str | None]] = {}

    def keep(norm, _inputs, output):
        made[id(output)] = (norm, output)

    def look(layer, inputs, named):
        x = next(iter((*inputs, *named.values())), None)
        norm = made.get(id(x), (None, None))[0]
        found.setdefault(paths[layer], set()).add(paths.get(norm))

    with watching(model) as hooks:
        for module, name in paths.items():
            if _has_gain(module):
                hooks.append(module.register_forward_hook(keep))
            elif name in names and layer_type(module) is nn.Linear:
                hooks.append(module.register_forward_pre_hook(look, with_kwargs=True))
        call(model, example_inputs)
    alone = {name: next(iter(norms)) for name, norms in found.items() if len(norms) == 1}
    return {name: norm for name, norm in alone.items() if norm is not None}


def norm_scale(*norms: nn.Module) -> Tensor:
    """Return the gains of B norms of one width D, (B, D), float64.

    >>> norm_scale(nn.LayerNorm(2))
    tensor([[1., 1.]], dtype=torch.float64)
    """
    return torch.stack([norm.weight.detach() for norm in norms]).double()
