"""A deep chain of convolutions without shortcuts and BatchNorm, in which the sizes of the layers multiply.

Source: the plain network of 20 layers in He et al., arXiv 1512.03385, section 4.2; it has BatchNorm and ReLU.
"""

from __future__ import annotations

from torch import nn

__all__ = ["CifarPlain"]

# For negative inputs, as PReLU begins; with 0 nineteen layers make all images alike, and 20 epochs on digits
# teach nothing.
SLOPE = 0.25


class CifarPlain(nn.Module):
    """ResNet-20 without shortcuts and BatchNorms: nineteen 3×3 convolutions of 16, 32 and 64 channels.

    Weights are normal with variance 2 / (D·(1 + slope²)), so that each layer passes on the size of its input.
    With zeros around the image they would not: at the edge a part of the kernel sees nothing. So the image
    goes on at its other side (circular padding). Between the layers stands a leaky ReLU.

    Args:
        num_classes: width of the classifier.
        width: factor on the channels.

    Source: arXiv 1512.03385, section 4.2, for the shape; arXiv 1502.01852 for the variance and the slope.

    >>> sum(isinstance(m, nn.Conv2d) for m in CifarPlain().modules())
    19
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0):
        super().__init__()
        layers, inputs = [], 3
        for stage, channels in enumerate((16, 32, 64)):
            outputs = max(1, round(width * channels))
            for i in range(7 if stage == 0 else 6):
                stride = 2 if stage > 0 and i == 0 else 1
                layers += [
                    nn.Conv2d(inputs, outputs, 3, stride, 1, padding_mode="circular"),
                    nn.LeakyReLU(SLOPE),
                ]
                inputs = outputs
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        """Map images (B, 3, H, W) to logits (B, num_classes)."""
        return self.fc(self.features(x).mean(dim=(2, 3)))
