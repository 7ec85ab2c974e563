"""How much faster the factors of a layer really are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lrpet.lowrank.arguments import renamed
from lrpet.lowrank.factors import make_factors
from lrpet.lowrank.layers import matrix_of, resolve_unfolding, unwrap
from lrpet.lowrank.observe import call, watching
from lrpet.lowrank.ranks import resolve_ranks
from lrpet.lowrank.timing import side_by_side

__all__ = ["measure_gains"]


@renamed(example="example_inputs")
@torch.no_grad()
def measure_gains(
    model: nn.Module,
    ranks: Mapping[str, int] | Sequence[int],
    example_inputs: Any,
    rounds: int = 15,
    unfolding: str | Mapping[str, str] = "rows",
) -> dict[str, float]:
    """Measure how many times as fast as a layer its two factors are, on its own inputs.

    Layers of one shape with inputs of one shape are measured once, eagerly, with the threads that PyTorch
    has.

    Args:
        model: the network, on its device and in its memory format.
        ranks: layer name → R, or a list in module order.
        example_inputs: a batch of inputs, as in use: a tensor, a tuple or a dict.
        rounds: timed repetitions; the gain is the median of their ratios.
        unfolding: as for :func:`lrpet.factorize`.

    Returns:
        Layer name → time of the layer by time of its factors, for the layers that run and have R < min(N, D).

    Raises:
        ValueError: ranks that do not fit the model.

    >>> list(measure_gains(nn.Sequential(nn.Conv2d(8, 16, 3)), {"0": 2}, torch.randn(1, 8, 6, 6), rounds=2))
    ['0']
    """
    model = unwrap(model)
    unfolding = resolve_unfolding(model, unfolding)
    ranks, inputs = resolve_ranks(model, ranks, unfolding), {}
    names = {model.get_submodule(name): name for name in ranks}

    def record(layer, given, _output):
        inputs.setdefault(names[layer], given[0])

    with watching(model) as hooks:
        for layer, name in names.items():
            if ranks[name] < min(matrix_of(layer, unfolding[name]).shape):
                hooks.append(layer.register_forward_hook(record))
        call(model, example_inputs)
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
            unfolding[name],
            x.shape,
            x.stride(),
            x.dtype,
        )
        if kind not in measured:
            factors = make_factors(layer, ranks[name], unfolding[name])
            for factor in factors:
                factor.weight.normal_(0, factor.weight[0].numel() ** -0.5)
            if layer.weight.ndim == 4 and layer.weight.is_contiguous(memory_format=torch.channels_last):
                factors = factors.to(memory_format=torch.channels_last)
            tasks = {"factors": partial(factors, x), "dense": partial(layer, x)}
            timings = side_by_side(tasks, rounds, x.device)
            measured[kind] = timings["dense"]["ratio_to_first"]
        gains[name] = measured[kind]
    return gains
