"""How much faster the factors of a layer really are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lrpet.lowrank.factors import make_factors
from lrpet.lowrank.ranks import resolve_ranks
from lrpet.lowrank.timing import side_by_side

__all__ = ["measure_gains"]


@torch.no_grad()
def measure_gains(
    model: nn.Module, ranks: Mapping[str, int] | Sequence[int], example: torch.Tensor, rounds: int = 15
) -> dict[str, float]:
    """Measure how many times as fast the two factors of each layer are as the layer itself, on its own inputs.

    Layers of one shape with inputs of one shape are measured once, eagerly, with the threads that PyTorch has.

    Args:
        model: the network, on its device and in its memory format.
        ranks: layer name → R, or a list in module order.
        example: a batch of inputs, as in use.
        rounds: timed repetitions; the gain is the median of their ratios.

    Returns:
        Layer name → time of the layer by time of its factors, for the layers that run and have R < min(N, D).

    Raises:
        ValueError: ranks that do not fit the model.

    >>> list(measure_gains(nn.Sequential(nn.Conv2d(8, 16, 3)), {"0": 2}, torch.randn(1, 8, 6, 6), rounds=2))
    ['0']
    """
    ranks = resolve_ranks(model, ranks)
    inputs, hooks = {}, []

    def record(layer, given, _output):
        inputs.setdefault(names[layer], given[0])

    names = {model.get_submodule(name): name for name in ranks}
    modes = {module: module.training for module in model.modules()}
    try:
        for layer, name in names.items():
            if ranks[name] < min(layer.weight.flatten(1).shape):
                hooks.append(layer.register_forward_hook(record))
        model.eval()(example)
    finally:
        for module, training in modes.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    gains, measured = {}, {}
    for name, x in inputs.items():
        layer = model.get_submodule(name)
        window = [getattr(layer, setting, None) for setting in ("stride", "padding", "dilation")]
        kind = (
            type(layer),
            layer.weight.shape,
            layer.weight.stride(),
            *window,
            ranks[name],
            x.shape,
            x.stride(),
            x.dtype,
        )
        if kind not in measured:
            factors = make_factors(layer, ranks[name])
            for factor in factors:
                factor.weight.normal_(0, factor.weight[0].numel() ** -0.5)
            factors = (
                factors.to(memory_format=torch.channels_last)
                if layer.weight.is_contiguous(memory_format=torch.channels_last)
                else factors
            )
            timings = side_by_side(
                {"factors": lambda: factors(x), "dense": lambda: layer(x)}, rounds, x.device
            )
            measured[kind] = timings["dense"]["ratio_to_first"]
        gains[name] = measured[kind]
    return gains
