"""A small vision transformer for 32×32 images: patch 4, width 192, depth 9, 12 heads, MLP ratio 2.

Source: Dosovitskiy et al., arXiv 2010.11929; the sizes are those of the LRPET authors' README (2.69 M
parameters, 174 M multiply-adds).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["SmallViT"]


class StochasticDepth(nn.Module):
    """In training sets a branch to zero for a share of the images; divides it by 1 − share for the others.

    Written here because the library loads no torchvision, whose ``ops.StochasticDepth`` does the same.
    Source: Huang et al., arXiv 1603.09382; for the division, arXiv 2012.12877.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x):
        """Map tokens (B, T, width) to (B, T, width)."""
        return x * F.dropout(torch.ones_like(x[:, :1, :1]), self.share) if self.training else x


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and with a shortcut; causal: no token sees a later one."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: int, stochastic_depth: float = 0.0, *, causal: bool = False
    ):
        super().__init__()
        self.heads, self.causal, self.drop = heads, causal, StochasticDepth(stochastic_depth)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width)
        )

    def forward(self, x):
        """Map tokens (B, T, width) to (B, T, width)."""
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        )  # (B, heads, T, width/heads) each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.drop(self.proj(mixed.transpose(1, 2).flatten(2)))
        return x + self.drop(self.mlp(self.norm2(x)))


class SmallViT(nn.Module):
    """Patches as tokens, a class token in front, a learned position for each.

    Args:
        num_classes: width of the classifier.
        width, depth, heads, mlp_ratio, patch: sizes; the defaults are the paper's.
        stochastic_depth: share of the images for which a branch is left out in training, in each block alike,
            as in the LRPET authors' code.

    Source: arXiv 2010.11929.

    >>> round(sum(p.numel() for p in SmallViT().parameters()) / 1e6, 2)
    2.69
    """

    def __init__(
        self,
        num_classes: int = 10,
        width: int = 192,
        depth: int = 9,
        heads: int = 12,
        mlp_ratio: int = 2,
        patch: int = 4,
        stochastic_depth: float = 0.1,
    ):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, (32 // patch) ** 2 + 1, width))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*[Block(width, heads, mlp_ratio, stochastic_depth) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        """Map images (B, 3, 32, 32) to logits (B, num_classes)."""
        x = self.patch(x).flatten(2).transpose(1, 2)  # (B, 64, width)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.fc(self.norm(self.blocks(x))[:, 0])
