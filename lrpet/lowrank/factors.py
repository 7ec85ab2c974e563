"""What takes the place of a dense layer: two thin ones, or a constant."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn
from torch.nn.utils import skip_init

from lrpet.lowrank.ranks import LayerReport

__all__ = ["ConstantOutput", "rebuild"]


class ConstantOutput(nn.Module):
    """What is left of a dead convolution: the same output at every pixel, with no multiply-add.

    Args:
        value: (N,), the output of each channel: the bias, or zero.
        kernel_size, stride, padding, dilation: those of the convolution, each (vertical, horizontal);
            they decide the size of the output.

    >>> import torch
    >>> ConstantOutput(torch.zeros(4), (3, 3), (2, 2), (1, 1), (1, 1))(torch.ones(1, 8, 6, 6)).shape
    torch.Size([1, 4, 3, 3])
    """

    def __init__(self, value, kernel_size, stride, padding, dilation):
        super().__init__()
        self.bias = nn.Parameter(value.detach().clone())
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation

    def forward(self, x):
        """Return (B, N, H_out, W_out) for x (B, C, H, W)."""
        size = [
            (x.shape[i + 2] + 2 * self.padding[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in (0, 1)
        ]
        return (
            self.bias.to(x.dtype).view(1, -1, 1, 1).expand(x.shape[0], -1, *size).clone()
        )  # an in-place ReLU may follow


def rebuild(model: nn.Module, reports: Sequence[LayerReport]) -> nn.Module:
    """Return a copy with the structure of a factorized network and weights that are yet to be loaded.

    Args:
        model: the dense architecture with any weights; it is not changed.
        reports: those of the factorized network, its ``factorization``.

    >>> reports = [LayerReport("0", 2, 0.9, "factorized")]
    >>> [tuple(p.shape) for p in rebuild(nn.Sequential(nn.Conv2d(8, 16, 3)), reports).parameters()]
    [(2, 8, 3, 3), (16, 2, 1, 1), (16,)]
    """
    compact = copy.deepcopy(model)
    compact.factorization = list(reports)
    for report in reports:
        replace_layer(compact, report)
    return compact


def replace_layer(model: nn.Module, report: LayerReport) -> None:
    """Put the layer that a report describes in the place of the dense one; factors come uninitialized and draw no random numbers."""
    old = model.get_submodule(report.name)
    if report.action == "dense":
        return
    if report.action == "constant":
        bias = old.bias if old.bias is not None else old.weight.new_zeros(old.weight.shape[0])
        new = ConstantOutput(bias, old.kernel_size, old.stride, symmetric_padding(old), old.dilation)
    else:
        new = make_factors(old, report.rank)
    model.set_submodule(report.name, new.train(old.training))


def make_factors(old: nn.Conv2d | nn.Linear, rank: int) -> nn.Sequential:
    """Return the two layers that take the place of a dense one, uninitialized but for the bias."""
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Linear):
        first = skip_init(nn.Linear, old.in_features, rank, bias=False, **like)
        second = skip_init(nn.Linear, rank, old.out_features, bias=old.bias is not None, **like)
    else:
        window = {
            "stride": old.stride,
            "padding": old.padding,
            "dilation": old.dilation,
            "padding_mode": old.padding_mode,
        }
        first = skip_init(nn.Conv2d, old.in_channels, rank, old.kernel_size, bias=False, **window, **like)
        second = skip_init(nn.Conv2d, rank, old.out_channels, 1, bias=old.bias is not None, **like)
    if old.bias is not None:
        second.bias = copy.deepcopy(old.bias)
    for factor in (first, second):
        factor.weight.requires_grad_(old.weight.requires_grad)
    return nn.Sequential(first, second)


def symmetric_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Return the padding as (vertical, horizontal), or None where it is uneven ("same" with an even window)."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding != "same":
        return conv.padding
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return (total[0] // 2, total[1] // 2) if not any(t % 2 for t in total) else None
