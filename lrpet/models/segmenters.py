"""Networks that give each pixel a class: PSPNet of segmentation-models-pytorch, and two small ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

from lrpet.models.resnet_cifar import CifarResNet

__all__ = ["build_segmenter"]
DEPTHS = {"fcn_resnet8": 8, "fcn_resnet20": 20}
STRIDE = 8  # of PSPNet's features, by dilation of the last two stages


class SmallFCN(nn.Module):
    """A CIFAR ResNet without its classifier, torchvision's head, bilinear upsampling.

    Source: Long et al., arXiv 1411.4038.
    """

    def __init__(self, depth: int, num_classes: int):
        super().__init__()
        self.body = CifarResNet(depth)
        del self.body.fc
        self.classifier = FCNHead(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, classes, H, W)."""
        features = self.body.blocks(F.relu(self.body.bn(self.body.conv(x))))  # (B, 64, H/4, W/4)
        logits = self.classifier(features)
        return F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=False)


def build_segmenter(name: str, num_classes: int) -> nn.Module:
    """Return a network with fresh random weights that maps (B, 3, H, W) to logits (B, num_classes, H, W).

    Args:
        name: ``fcn_resnet8`` or ``fcn_resnet20``; ``pspnet_resnet18`` or ``pspnet_resnet50``, whose images
            must have edges that are multiples of 32 pixels.
        num_classes: the ground, class 0, counted.

    Raises:
        ImportError: segmentation-models-pytorch is not installed.

    Source: Zhao et al., arXiv 1612.01105, for PSPNet: features of stride 8 from all of the ResNet.

    >>> sum(p.numel() for p in build_segmenter("fcn_resnet8", 11).parameters()) < 1_000_000
    True
    """
    if name in DEPTHS:
        return SmallFCN(DEPTHS[name], num_classes)
    try:
        from segmentation_models_pytorch import PSPNet
    except ImportError as error:
        raise ImportError(
            f"{name} needs the package segmentation-models-pytorch, which is not installed: "
            "pip install 'lrpet[segmentation]', or that package"
        ) from error
    encoder = name.removeprefix("pspnet_")
    network = PSPNet(encoder, encoder_weights=None, encoder_depth=5, upsampling=STRIDE, classes=num_classes)
    network.encoder.make_dilated(STRIDE)
    return network
