"""The control of the comparison of LRP with LRPET: LRP with the steps that LRPET's larger weights would make.

Where a BatchNorm follows, LRPET's weight is LRP's times a number F ≥ 1, and both networks compute the same.
What differs is the step: for a weight F times as large the gradient is 1/F times as large. So LRP makes
LRPET's run if at each projection, with f the factor by which LRPET would scale the layer up, its learning
rate is divided by f², its momentum buffer multiplied by f and its weight decay multiplied by f². Only
BatchNorm's eps and the lag of its running statistics stand between the two.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["match_steps"]


@torch.no_grad()
def match_steps(optimizer: torch.optim.SGD, factors: Mapping[nn.Parameter, float | Tensor]) -> None:
    """Let the next steps of some weights be those of weights f times as large, seen from where they are.

    Args:
        optimizer: SGD in which each of the weights is a group of its own. The group's ``lr`` falls to 1/f² of
            what it was, as does ``lr_scale``, by which whoever sets learning rates multiplies them; its
            ``weight_decay`` rises to f² times what it was.
        factors: weight → f > 0.

    Raises:
        ValueError: a weight shares its group with others.

    Source: W − η·(μ·m + g/f + λ·f·W)/f = W − (η/f²)·(μ·f·m + g + λ·f²·W), the step of a weight f·W seen at W.

    >>> weight = nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([{"params": [weight]}], lr=0.1, weight_decay=0.01)
    >>> match_steps(optimizer, {weight: 2.0})
    >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]
    (0.025, 0.04)
    """
    groups = {group["params"][0]: group for group in optimizer.param_groups if len(group["params"]) == 1}
    for weight, f in factors.items():
        if weight not in groups:
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} shares its optimizer group; give it one of its own"
            )
        group = groups[weight]
        group["lr_scale"] = group.get("lr_scale", 1.0) / f**2
        group["lr"] = group["lr"] / f**2  # a tensor on a GPU
        group["weight_decay"] = group["weight_decay"] * f**2
        buffer = optimizer.state[weight].get("momentum_buffer")
        if buffer is not None:
            buffer.mul_(f)
