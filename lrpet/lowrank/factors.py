"""What takes the place of a dense layer: two thin ones, or a constant."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lrpet.lowrank.layers import TRANSPOSED, copy_of, layer_type, replace_module, rows_first, unwrap
from lrpet.lowrank.ranks import LayerReport, Report

__all__ = ["ConstantOutput", "LowRankConv", "LowRankConv2d", "LowRankLinear", "rebuild"]


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class _Factors(nn.Sequential):
    """Two thin layers in the place of a dense one, which can still be asked what the dense one was asked.

    ``weight`` is the product of the factors, computed at each use, so a module that multiplies by it itself
    computes the same as before and saves nothing.
    """

    @property
    def bias(self) -> Tensor | None:
        """Of the second factor, (N,)."""
        return self[1].bias

    @property
    def weight(self) -> Tensor:
        """The product of the factors, in the shape of the dense layer's weight."""
        first, second = (_outputs_first(factor) for factor in self)  # (R, C, ...), (N, R, ...)
        if self.unfolding == "rows":
            product = (second.flatten(1) @ first.flatten(1)).view(-1, *first.shape[1:])
        else:
            product = (second.movedim(1, -1) @ first.flatten(1)).movedim(-1, 1)
        return rows_first(_window(self), product)  # in a transposed layer's order

    @property
    def rank(self) -> int:
        """R."""
        return len(_outputs_first(self[0]))

    @property
    def unfolding(self) -> str:
        """ "rows" where the window is in the first factor, "columns" where it is in the second."""
        return "columns" if math.prod(getattr(self[1], "kernel_size", ())) > 1 else "rows"


def _window(layer: nn.Module) -> nn.Module:
    """Return the layer of a factor, which may have been factorized in its turn, that has the window."""
    while isinstance(layer, _Factors):
        layer = layer[0 if layer.unfolding == "rows" else 1]
    return layer


def _outputs_first(factor: nn.Module) -> Tensor:
    return rows_first(_window(factor), factor.weight)


class LowRankLinear(_Factors):
    """A Linear layer as two: D → R → N.

    >>> layer = LowRankLinear(nn.Linear(8, 2, bias=False), nn.Linear(2, 5))
    >>> layer, layer.weight.shape
    (LowRankLinear(in_features=8, out_features=5, rank=2), torch.Size([5, 8]))
    """

    def __repr__(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"LowRankLinear({sizes})"

    @property
    def in_features(self) -> int:
        """D."""
        return self[0].in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self[1].out_features


class LowRankConv(_Factors):
    """A convolution, of any number of dimensions or transposed, as two: the window, C → R, and 1×1, R → N.

    With the unfolding "columns" they are 1×1, C → R, and the window, R → N. It answers ``kernel_size``,
    ``stride``, ``padding``, ``dilation`` and ``padding_mode`` as the factor with the window does, and
    ``groups``, which is 1.

    >>> layer = LowRankConv(nn.Conv1d(8, 2, 3, bias=False), nn.Conv1d(2, 5, 1))
    >>> layer.weight.shape, layer.kernel_size, layer.out_channels
    (torch.Size([5, 8, 3]), (3,), 5)
    """

    WINDOW = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "output_padding")

    def __getattr__(self, name: str):
        return getattr(_window(self), name) if name in self.WINDOW else super().__getattr__(name)

    groups = 1

    @property
    def in_channels(self) -> int:
        """C."""
        return self[0].in_channels

    @property
    def out_channels(self) -> int:
        """N."""
        return self[1].out_channels


class LowRankConv2d(LowRankConv):
    """A Conv2d as two: a k_h×k_w one from C to R channels and a 1×1 one from R to N, or 1×1 first.

    >>> layer = LowRankConv2d(nn.Conv2d(8, 2, 3, bias=False), nn.Conv2d(2, 5, 1))
    >>> layer.weight.shape, layer.rank
    (torch.Size([5, 8, 3, 3]), 2)
    """


def whole_layer(model: nn.Module, name: str) -> str:
    """Return the name of the layer that a factor stands for with the others; of any other module its own.

    >>> model = nn.Sequential(LowRankLinear(nn.Linear(8, 2, bias=False), nn.Linear(2, 5)), nn.ReLU())
    >>> whole_layer(model, "0.1"), whole_layer(model, "1")
    ('0', '1')
    """
    while name and isinstance(model.get_submodule(parent := name.rpartition(".")[0]), _Factors):
        name = parent
    return name


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
        reports: those of the factorized network, its ``factorization``. For a network that was factorized
            twice they are those of the second time, and ``model`` is what the first time made.

    >>> reports = [LayerReport("0", 2, 0.9, "factorized")]
    >>> [tuple(p.shape) for p in rebuild(nn.Sequential(nn.Conv2d(8, 16, 3)), reports).parameters()]
    [(2, 8, 3, 3), (16, 2, 1, 1), (16,)]
    """
    compact, made = copy_of(unwrap(model)), {}
    for report in reports:
        compact = replace_layer(compact, report, made)
    return record(compact, Report(reports))


def record(compact: nn.Module, reports: list[LayerReport]) -> nn.Module:
    """Note on a network that it was factorized, after whatever was done to it before; return it."""
    compact.factorization = reports
    layers = {report.name: [report.rank, report.action] for report in reports}
    for report in reports:
        if report.unfolding != "rows":  # files with rows alone stay as they were before there was another
            layers[report.name].append(report.unfolding)
    done = ("factorize", layers)
    compact.compressions = [*getattr(compact, "compressions", ()), done]
    return compact


def replace_layer(model: nn.Module, report: LayerReport, made: dict[int, _Factors]) -> nn.Module:
    """Put the layer that a report describes in the place of the dense one, under all names; return the model.

    Factors come uninitialized and draw no random numbers. ``made`` remembers them by the weight they stand
    for, so that layers that share a weight share factors.
    """
    old = model.get_submodule(report.name)
    if report.action == "dense":
        return model
    if report.action == "constant":
        bias = old.bias if old.bias is not None else old.weight.new_zeros(old.weight.shape[0])
        new = ConstantOutput(bias, old.kernel_size, old.stride, symmetric_padding(old), old.dilation)
    else:
        new = make_factors(old, report.rank, report.unfolding)
        other = made.setdefault(id(old.weight), new)
        new[0].weight, new[1].weight = other[0].weight, other[1].weight
    for hooks in HOOKS:
        getattr(new, hooks).update(getattr(old, hooks))
    new._is_full_backward_hook = old._is_full_backward_hook
    for parent in model.modules():
        if isinstance(parent, nn.TransformerEncoderLayer) and old in parent.children():
            parent.activation_relu_or_gelu = 0  # or its fast path reads .weight, where factors save nothing
    return replace_module(model, report.name, new.train(old.training))


def make_factors(old: nn.Module, rank: int, unfolding: str = "rows") -> _Factors:
    """Return the two layers that take the place of a dense one, uninitialized except for the bias."""
    like, kind = {"device": old.weight.device, "dtype": old.weight.dtype}, layer_type(old)
    if kind is nn.Linear:
        N, D = rows_first(old, old.weight).shape
        first = skip_init(nn.Linear, D, rank, bias=False, **like)
        second = skip_init(nn.Linear, rank, N, bias=old.bias is not None, **like)
        factors = LowRankLinear(first, second)
    else:
        settings = ("stride", "padding", "dilation", "padding_mode")
        window = {setting: getattr(old, setting) for setting in settings}
        if kind in TRANSPOSED:
            window["output_padding"] = old.output_padding
        pointwise = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(old.kernel_size) - 1]
        window = window | {"kernel_size": old.kernel_size}
        makers = [(kind, window), (pointwise, {"kernel_size": 1})]
        (first, of_first), (second, of_second) = makers if unfolding == "rows" else makers[::-1]
        first = skip_init(first, old.in_channels, rank, bias=False, **of_first, **like)
        second = skip_init(second, rank, old.out_channels, bias=old.bias is not None, **of_second, **like)
        factors = (LowRankConv2d if kind is nn.Conv2d else LowRankConv)(first, second)
    if old.bias is not None:
        second.bias = copy.deepcopy(old.bias)
    for factor in factors:
        factor.weight.requires_grad_(old.weight.requires_grad)
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(old.weight.ndim)
    if not old.weight.is_contiguous() and memory_format is not None:
        factors.to(memory_format=memory_format)
    return factors


def symmetric_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Return the padding as (vertical, horizontal), or None where it is uneven ("same", even window)."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding != "same":
        return conv.padding
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return (total[0] // 2, total[1] // 2) if not any(t % 2 for t in total) else None
