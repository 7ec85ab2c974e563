"""GoogLeNet for 32×32 images, the variant usual on CIFAR: 6.17 M parameters, 1.52 G multiply-adds.

Source: Szegedy et al., arXiv 1409.4842, table 1; the CIFAR variant starts with one 3×3 convolution of 192
channels, has BatchNorm after each convolution, and two 3×3 convolutions in the place of each 5×5 one.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["CifarGoogLeNet"]

# Channels of each module: 1×1; 3×3 (reduced, out); double 3×3 (reduced, out); pooled.
STAGES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


def _unit(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


class Inception(nn.Module):
    """Four branches side by side, their outputs joined along the channels."""

    def __init__(self, inputs: int, n1: int, reduce3: int, n3: int, reduce5: int, n5: int, pooled: int):
        super().__init__()
        self.branches = nn.ModuleList(
            [
                nn.Sequential(*_unit(inputs, n1, 1)),
                nn.Sequential(*_unit(inputs, reduce3, 1), *_unit(reduce3, n3, 3)),
                nn.Sequential(*_unit(inputs, reduce5, 1), *_unit(reduce5, n5, 3), *_unit(n5, n5, 3)),
                nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), *_unit(inputs, pooled, 1)),
            ]
        )
        self.outputs = n1 + n3 + n5 + pooled

    def forward(self, x):
        """Map (B, C, H, W) to (B, outputs, H, W)."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class CifarGoogLeNet(nn.Module):
    """Nine inception modules in three stages at 32, 16 and 8 pixels.

    Weights begin as PyTorch's layers do, as the LRPET authors' do.

    Args:
        num_classes: width of the classifier.
        width: factor on the channels.

    Source: arXiv 1409.4842, table 1.

    >>> sum(p.numel() for p in CifarGoogLeNet().parameters())
    6166250
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0):
        super().__init__()

        def scaled(channels: int) -> int:
            return max(1, round(width * channels))

        inputs = scaled(192)
        layers = _unit(3, inputs, 3)
        for stage, modules in enumerate(STAGES):
            if stage:
                layers.append(nn.MaxPool2d(3, stride=2, padding=1))
            for channels in modules:
                layers.append(Inception(inputs, *map(scaled, channels)))
                inputs = layers[-1].outputs
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x):
        """Map images (B, 3, 32, 32) to logits (B, num_classes)."""
        return self.fc(self.features(x).mean(dim=(2, 3)))
