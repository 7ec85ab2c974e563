"""How large the gradient still is when it arrives at each convolution, and how large the norms of the weights let it be."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrpet.lowrank.projector import LowRankProjector
from lrpet.lowrank.ranks import compressible_layers

__all__ = ["compare_projections", "gradient_norms", "norm_product_bound", "operator_norm"]


def gradient_norms(model: nn.Module, x: Tensor, y: Tensor) -> pd.DataFrame:
    """Measure the gradient of the mean cross-entropy of one batch at every convolution.

    Args:
        model: a network, used in the mode that it is in; gradients that it holds stay as they are.
        x: images, (B, C, H, W).
        y: labels, (B,).

    Returns:
        A row a convolution in the order of execution: ``layer``, ``output_gradient_norm`` = ‖∂L/∂h‖ over the batch, with h
        what the convolution puts out, ``gradient_norm`` = ‖∂L/∂M‖_F, ``weight_norm`` = ‖M‖_F.

    >>> model = nn.Sequential(nn.Conv2d(3, 10, 1), nn.ReLU(), nn.Conv2d(10, 10, 1), nn.Flatten())
    >>> gradient_norms(model, torch.ones(2, 3, 1, 1), torch.tensor([0, 1])).layer.tolist()
    ['0', '2']
    """
    outputs, _, logits = _pass(model, x)
    weights = [model.get_submodule(name).weight for name in outputs]
    gradients = torch.autograd.grad(F.cross_entropy(logits, y), [*outputs.values(), *weights])
    norms = torch.stack([g.norm() for g in (*gradients, *weights)]).view(3, -1).tolist()
    return pd.DataFrame(
        {
            "layer": list(outputs),
            **dict(zip(("output_gradient_norm", "gradient_norm", "weight_norm"), norms, strict=True)),
        }
    )


def compare_projections(
    model: nn.Module, x: Tensor, y: Tensor, ranks: Mapping[str, int]
) -> dict[str, pd.DataFrame]:
    """Measure how large the gradients of a chain are as it is, after one projection by LRP, and after one by LRPET.

    Args:
        model: a chain of convolutions; it is not changed.
        x: images, (B, C, H, W).
        y: labels, (B,).
        ranks: layer → R.

    Returns:
        dense, lrp and lrpet → the table of :func:`gradient_norms` with ``gradient`` for its ``output_gradient_norm``, ``bound`` =
        ‖∂L/∂h_last‖ · Π_{j>l} ‖C_j‖₂, and ``norm_product`` = Π_{j>l} ‖M_j‖_F, which energy transfer keeps.

    Source: arXiv 2204.05566, whose argument the last column is.

    >>> chain = nn.Sequential(nn.Conv2d(3, 10, 1), nn.Conv2d(10, 10, 1), nn.Flatten())
    >>> list(compare_projections(chain, torch.ones(2, 3, 1, 1), torch.tensor([0, 1]), {"1": 4}))
    ['dense', 'lrp', 'lrpet']
    """
    tables = {}
    for method in ("dense", "lrp", "lrpet"):
        network = copy.deepcopy(model)
        if method != "dense":
            LowRankProjector(network, ranks, energy_transfer=method == "lrpet").step()
        table = gradient_norms(network, x, y).rename(columns={"output_gradient_norm": "gradient"})
        table["bound"] = table["gradient"].iloc[-1] * norm_product_bound(network, x).to_numpy()
        table["norm_product"] = table["weight_norm"][::-1].cumprod()[::-1] / table["weight_norm"]
        tables[method] = table
    return tables


def norm_product_bound(model: nn.Module, x: Tensor) -> pd.Series:
    """Return Π_{j>l} ‖C_j‖₂ for every convolution l: no gradient grows more on its way from the last convolution to l.

    ‖∂L/∂h_l‖ ≤ ‖∂L/∂h_last‖ · Π_{j>l} ‖C_j‖₂, where C_j is the convolution as a map of images. It holds for a chain of
    convolutions with functions of slope at most 1 between them, such as ReLU and average pooling.

    Args:
        model: a chain; that it is one is not checked.
        x: images, (B, C, H, W); only their size matters.

    Returns:
        A number a convolution, by name, in the order of execution; 1 for the last.

    Raises:
        ValueError: a convolution whose norm :func:`operator_norm` does not know.

    Source: the chain rule and ‖AB‖₂ ≤ ‖A‖₂·‖B‖₂; arXiv 2204.05566 argues with such a product.

    >>> model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1))
    >>> model[1].weight = nn.Parameter(torch.full((1, 1, 1, 1), -3.0))
    >>> norm_product_bound(model, torch.ones(1, 1, 4, 4)).to_dict()
    {'0': 3.0, '1': 1.0}
    """
    with torch.no_grad():
        _, sizes, _ = _pass(model, x)
    bounds, product = {}, 1.0
    for name, size in reversed(sizes.items()):
        bounds[name] = product
        product *= operator_norm(model.get_submodule(name), size)
    return pd.Series(bounds)[::-1]


@torch.no_grad()
def operator_norm(layer: nn.Conv2d, size: tuple[int, int]) -> float:
    """Return ‖C‖₂, the largest factor by which a convolution stretches an image.

    Exact for circular padding: the Fourier transform turns the convolution into one matrix a frequency, and with a stride of s
    into one matrix for each s² frequencies that fall together. An upper bound for padding with zeros: the image and its
    border lie on a larger circle, of whose output a part is read.

    Args:
        layer: one group; padded with zeros, or with circular padding of half the kernel and a stride that divides the image.
        size: height and width of the image that comes in.

    Raises:
        ValueError: another kind of padding or stride, or several groups.

    Source: Sedghi, Gupta and Long, arXiv 1805.10408; the stride by the aliasing of frequencies.

    >>> layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    >>> layer.weight = nn.Parameter(torch.full((1, 1, 3, 3), 2.0))
    >>> round(operator_norm(layer, (8, 8)), 4)
    18.0
    """
    known = layer.groups == 1 and not isinstance(layer.padding, str)
    half = [d * (k - 1) / 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if known and layer.padding_mode == "zeros":
        size = [-(-(n + 2 * p) // s) * s for n, p, s in zip(size, layer.padding, layer.stride, strict=True)]
    elif (
        not known
        or layer.padding_mode != "circular"
        or list(layer.padding) != half
        or any(n % s for n, s in zip(size, layer.stride, strict=True))
    ):
        raise ValueError(
            f"layer must be padded with zeros, or circularly by half its kernel with a stride that divides {tuple(size)}; got {layer}"
        )
    (H, W), (s, t), (d, e) = size, layer.stride, layer.dilation
    kernel = torch.zeros(
        *layer.weight.shape[:2], H, W, dtype=torch.float64, device=layer.weight.device
    )  # (N, C, H, W)
    for u in range(layer.kernel_size[0]):
        for v in range(layer.kernel_size[1]):
            kernel[:, :, u * d % H, v * e % W] += layer.weight[
                :, :, u, v
            ]  # a kernel wider than the image wraps around
    N, C = kernel.shape[:2]
    aliases = (
        torch.fft.fft2(kernel).view(N, C, s, H // s, t, W // t).permute(3, 5, 0, 1, 2, 4)
    )  # (H/s, W/t, N, C, s, t)
    return float(
        torch.linalg.matrix_norm(aliases.reshape(H // s, W // t, N, C * s * t), 2).max() / (s * t) ** 0.5
    )


def _pass(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]], Tensor]:
    """Return what each convolution puts out and the size of what it takes in, in the order of execution, and the logits."""
    outputs, sizes, hooks = {}, {}, []

    def keep(name):
        def hook(layer, inputs, output):
            outputs[name], sizes[name] = output, tuple(inputs[0].shape[-2:])
            return output.clone()  # a ReLU that works in place would turn the kept one into its own output

        return hook

    for name in compressible_layers(model):
        hooks.append(model.get_submodule(name).register_forward_hook(keep(name)))
    try:
        return outputs, sizes, model(x)
    finally:
        for hook in hooks:
            hook.remove()
