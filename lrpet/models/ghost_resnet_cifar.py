"""Ghost-ResNet-56 for 32×32 images: a cheap depthwise convolution makes half of each layer's channels.

It makes them from the other half, which a usual convolution computes. Source: Han et al., "GhostNet: More
Features from Cheap Operations", arXiv 1911.11907, section 4.1 (s = 2, d = 3).
"""

from __future__ import annotations

import torch
from torch import nn

from lrpet.models.resnet_cifar import Block, CifarResNet

__all__ = ["GhostResNet"]


class Ghost(nn.Module):
    """A 3×3 convolution to half the channels, and a depthwise 3×3 one of those for the other half."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        half = outputs // 2
        self.primary = nn.Conv2d(inputs, half, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.cheap = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)

    def forward(self, x):
        """Map (B, C, H, W) to (B, outputs, H/stride, W/stride)."""
        x = self.bn1(self.primary(x))
        return torch.cat([x, self.bn2(self.cheap(x))], dim=1)


class GhostBlock(Block):
    """The residual block with ghost convolutions, which bring their BatchNorm with them."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__(inputs, outputs, stride)
        self.conv1, self.bn1 = Ghost(inputs, outputs, stride), nn.Identity()
        self.conv2, self.bn2 = Ghost(outputs, outputs, 1), nn.Identity()


class GhostResNet(CifarResNet):
    """The CIFAR ResNet of a given depth, every convolution but the first replaced by a ghost one.

    Args:
        depth: 56 in the literature.
        num_classes: width of the classifier.

    Source: arXiv 1911.11907, section 4.1; 0.43 M parameters.

    >>> round(sum(p.numel() for p in GhostResNet(56).parameters()) / 1e6, 2)
    0.44
    """

    def __init__(self, depth: int = 56, num_classes: int = 10):
        super().__init__(depth, num_classes, GhostBlock)
