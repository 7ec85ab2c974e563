"""A language model of bytes: causal transformer blocks of width 128, as many as four.

Source: Radford et al. 2019 (GPT-2) for the order of norms and shortcuts; the sizes are ours.
"""

from __future__ import annotations

import torch
from torch import nn

from lrpet.models.vit import Block

__all__ = ["ByteTransformer"]


class ByteTransformer(nn.Module):
    """Says of each byte of a text how likely each next byte is, from it and those before.

    Args:
        num_classes: how many bytes there are.
        width, depth, heads, mlp_ratio: sizes.
        context: bytes that it can read.

    Source: as above.

    >>> round(sum(p.numel() for p in ByteTransformer().parameters()) / 1e6, 2)
    0.87
    """

    def __init__(
        self,
        num_classes: int = 256,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: int = 4,
        context: int = 128,
    ):
        super().__init__()
        self.token = nn.Embedding(num_classes, width)
        self.position = nn.Parameter(torch.empty(context, width))
        for table in (self.token.weight, self.position):
            nn.init.normal_(table, std=0.02)
        self.blocks = nn.Sequential(*[Block(width, heads, mlp_ratio, causal=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        """Map bytes (B, T), int64, T at most the context, to logits (B, T, num_classes) of the next ones."""
        x = self.token(x) + self.position[: x.shape[1]]
        return self.fc(self.norm(self.blocks(x)))
