"""VGG-16 with BatchNorm for 32×32 images: thirteen 3×3 convolutions and one Linear layer.

Source: Simonyan and Zisserman, arXiv 1409.1556, configuration D, with the single classifier that is usual on
CIFAR.
"""

from __future__ import annotations

from torch import nn

__all__ = ["CifarVGG16"]

WIDTHS = (
    64,
    64,
    "pool",
    128,
    128,
    "pool",
    256,
    256,
    256,
    "pool",
    512,
    512,
    512,
    "pool",
    512,
    512,
    512,
    "pool",
)


class CifarVGG16(nn.Module):
    """Five stages of convolutions with BatchNorm, each halving the image.

    Convolutions begin Kaiming-normal with fan-out, as the LRPET authors' do.

    Args:
        num_classes: width of the classifier.
        width: factor on the channels.

    Source: arXiv 1409.1556, table 1, column D.

    >>> sum(isinstance(m, nn.Conv2d) for m in CifarVGG16().modules())
    13
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0):
        super().__init__()
        layers, inputs = [], 3
        for channels in WIDTHS:
            if channels == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                outputs = max(1, round(width * channels))
                layers += [
                    nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(inplace=True),
                ]
                inputs = outputs
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x):
        """Map images (B, 3, 32, 32) to logits (B, num_classes)."""
        return self.fc(self.features(x).mean(dim=(2, 3)))
