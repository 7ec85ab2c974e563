"""ResNet-20, 32, 44, 56 and 110 for 32×32 images, and ResNet-8 for the smoke profile.

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

__all__ = ["CifarResNet"]


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (type A: every second pixel, zero channels)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.missing = stride, outputs - inputs

    def forward(self, x):
        """Map (B, C, H, W) to (B, N, H/stride, W/stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1 or self.missing:
            half = self.missing // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.missing - half))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """A network of depth 6n + 2: three stages of n blocks with 16, 32 and 64 channels.

    Args:
        depth: 20, 32, 44, 56, 110 in the literature; any 6n + 2.
        num_classes: width of the classifier.
        block: what a stage is made of; called with inputs, outputs and stride.
        width: factor on the channels.

    Raises:
        ValueError: depth is not 6n + 2.

    Source: arXiv 1512.03385, section 4.2; Kaiming-normal initialization of convolutions and classifier.

    >>> sum(p.numel() for p in CifarResNet(20).parameters())
    269722
    """

    def __init__(self, depth: int, num_classes: int = 10, block: type[nn.Module] = Block, width: float = 1.0):
        super().__init__()
        n, rest = divmod(depth - 2, 6)
        if rest or n < 1:
            raise ValueError(f"depth of a CIFAR ResNet is 6n + 2 (8, 20, 32, 44, 56, 110); got {depth}")
        widths, blocks = [max(1, round(width * channels)) for channels in (16, 32, 64)], []
        self.conv = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        for stage, channels in enumerate(widths):
            for i in range(n):
                first = i == 0 and stage > 0
                blocks.append(block(widths[stage - 1] if first else channels, channels, 2 if first else 1))
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x):
        """Map images (B, 3, H, W) to logits (B, num_classes)."""
        x = F.relu(self.bn(self.conv(x)))
        return self.fc(self.blocks(x).mean(dim=(2, 3)))
