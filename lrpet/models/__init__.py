"""The networks, by name."""

from __future__ import annotations

from functools import partial

from torch import nn

from lrpet.models.ghost_resnet_cifar import GhostResNet
from lrpet.models.googlenet_cifar import CifarGoogLeNet
from lrpet.models.resnet_cifar import CifarResNet
from lrpet.models.vgg_cifar import CifarVGG16
from lrpet.models.vit import SmallViT

__all__ = ["MODELS", "build_model"]

TORCHVISION = ("resnet18", "resnet34", "resnet50")
BUILDERS = {f"resnet{depth}": partial(CifarResNet, depth) for depth in (8, 20, 32, 44, 56, 110)} | {
    "vgg16": CifarVGG16,
    "googlenet": CifarGoogLeNet,
    "ghost_resnet56": partial(GhostResNet, 56),
    "vit": SmallViT,
}
MODELS = (*BUILDERS, *TORCHVISION)


def build_model(name: str, num_classes: int = 10) -> nn.Module:
    """Build a network with fresh random weights.

    Args:
        name: ``resnet8`` … ``resnet110``, ``vgg16``, ``googlenet``, ``ghost_resnet56`` and ``vit`` for 32×32 images,
            ``resnet18``, ``resnet34``, ``resnet50`` (torchvision's) for larger ones.
        num_classes: width of the classifier.

    Returns:
        A module that maps (B, 3, H, W) float images to (B, num_classes) logits.

    Raises:
        ValueError: unknown name, or no number of classes.

    Source: named in each file; torchvision.models for the larger ones.

    >>> build_model("resnet20").fc.out_features
    10
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes must be a whole number of 1 or more; got {num_classes!r}")
    if name in BUILDERS:
        return BUILDERS[name](num_classes=num_classes)
    if name in TORCHVISION:
        import torchvision  # 2 s to import, so only where it is asked for

        return getattr(torchvision.models, name)(num_classes=num_classes)
    raise ValueError(f"model must be one of {', '.join(MODELS)}; got {name!r}")
