"""bfloat16 on a CPU that has no instructions for it: products in float32, rounded where bfloat16 ends."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

__all__ = ["Bfloat16Products", "has_bfloat16_products"]
PRODUCTS = {
    torch.ops.aten.convolution,
    torch.ops.aten.convolution_backward,
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
}


def has_bfloat16_products(device: torch.device) -> bool:
    """Tell whether bfloat16 products are fast on a device; on a CPU they need AVX-512 or its like."""
    return device.type != "cpu" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class Bfloat16Products(TorchDispatchMode):
    """Within it, products and convolutions of bfloat16 tensors are computed in float32 and rounded.

    That is what the instructions of other CPUs do: factors of eight bits, sums in float32. Without them
    PyTorch takes a loop that is some twelve times as slow as float32 itself.

    >>> x = torch.ones(2, 2, dtype=torch.bfloat16)
    >>> with Bfloat16Products():
    ...     x @ x
    tensor([[2., 2.],
            [2., 2.]], dtype=torch.bfloat16)
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket not in PRODUCTS or not any(
            isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in args
        ):
            return func(*args, **kwargs)
        wide = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return tree_map_only(torch.Tensor, torch.Tensor.bfloat16, func(*wide[0], **wide[1]))
