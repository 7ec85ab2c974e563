"""The networks, by name."""

from __future__ import annotations

from torch import nn

from lrpet.models.resnet_cifar import CifarResNet

__all__ = ["MODELS", "build_model"]

TORCHVISION = ("resnet18", "resnet34", "resnet50")
CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (8, 20, 32, 44, 56, 110)}
MODELS = (*CIFAR_RESNETS, *TORCHVISION)


def build_model(name: str, num_classes: int = 10) -> nn.Module:
    """Build a network with fresh random weights.

    Args:
        name: ``resnet8`` … ``resnet110`` for small images, ``resnet18``, ``resnet34``, ``resnet50`` (torchvision's)
            for larger ones.
        num_classes: width of the classifier.

    Returns:
        A module that maps (B, 3, H, W) float images to (B, num_classes) logits.

    Raises:
        ValueError: unknown name.

    Source: arXiv 1512.03385; torchvision.models for the larger ones.

    >>> build_model("resnet20").fc.out_features
    10
    """
    if name in CIFAR_RESNETS:
        return CifarResNet(CIFAR_RESNETS[name], num_classes)
    if name in TORCHVISION:
        import torchvision  # 2 s to import, so only where it is asked for

        return getattr(torchvision.models, name)(num_classes=num_classes)
    raise ValueError(f"model must be one of {', '.join(MODELS)}; got {name!r}")
