"""The networks, by name."""

from __future__ import annotations

from functools import partial
from numbers import Integral

from torch import nn

from lrpet.models.byte_transformer import ByteTransformer
from lrpet.models.ghost_resnet_cifar import GhostResNet
from lrpet.models.googlenet_cifar import CifarGoogLeNet
from lrpet.models.narrow_resnet import narrow_resnet
from lrpet.models.plain_cifar import CifarPlain
from lrpet.models.resnet_cifar import CifarResNet
from lrpet.models.unboxed import unboxed
from lrpet.models.vgg_cifar import CifarVGG16
from lrpet.models.vit import SmallViT

__all__ = ["DETECTORS", "MODELS", "SCALABLE", "SEGMENTERS", "build_model", "unboxed"]

TORCHVISION = ("resnet18", "resnet34", "resnet50")
BUILDERS = {f"resnet{depth}": partial(CifarResNet, depth) for depth in (8, 20, 32, 44, 56, 110)} | {
    "vgg16": CifarVGG16,
    "googlenet": CifarGoogLeNet,
    "plain20": CifarPlain,
    "ghost_resnet56": partial(GhostResNet, 56),
    "vit": SmallViT,
    "vit_small": partial(SmallViT, width=128, depth=4, heads=8),
    "byte_transformer": ByteTransformer,
}
FIXED = ("ghost_resnet56", "vit", "vit_small", "byte_transformer")
# those that build_model can make narrower
SCALABLE = (*(name for name in BUILDERS if name not in FIXED), *TORCHVISION)
MODELS = (*BUILDERS, *TORCHVISION)  # that classify
DETECTORS = (
    *("fasterrcnn_resnet8_fpn", "fasterrcnn_resnet20_fpn"),
    *("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"),
    *("fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"),
    *("fcos_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"),
    *("ssd300_vgg16", "ssdlite320_mobilenet_v3_large"),
)
SEGMENTERS = ("fcn_resnet8", "fcn_resnet20", "pspnet_resnet18", "pspnet_resnet50")


def build_model(name: str, num_classes: int = 10, width: float = 1.0) -> nn.Module:
    """Build a network with fresh random weights.

    Args:
        name: ``resnet8`` … ``resnet110``, ``vgg16``, ``googlenet``, ``plain20``, ``ghost_resnet56``,
            ``vit`` and ``vit_small`` (width 128, depth 4) for 32×32 images, ``resnet18``, ``resnet34``,
            ``resnet50`` (torchvision's) for larger ones, ``byte_transformer`` for text; for boxes and masks
            those of :func:`lrpet.models.detectors.build_detector` and
            :func:`lrpet.models.segmenters.build_segmenter`.
        num_classes: width of the classifier; of a detector the kinds of objects.
        width: factor on the number of channels of every layer, for the ResNets, VGG-16, GoogLeNet and the
            plain network.

    Returns:
        A module that maps (B, 3, H, W) float images to (B, num_classes) logits; a segmenter to
        (B, num_classes, H, W); of text, bytes (B, T) to (B, T, num_classes).

    Raises:
        TypeError: the name is no text, or the number of classes no integer.
        ValueError: unknown name, no number of classes, or a width that the network does not come in.

    Source: named in each file; torchvision.models for the larger ones.

    >>> build_model("resnet20").fc.out_features
    10
    """
    whole = isinstance(num_classes, Integral) and not isinstance(num_classes, bool)
    if not whole or num_classes < 1:
        kind = ValueError if whole else TypeError
        raise kind(f"num_classes must be a whole number of 1 or more; got {num_classes!r}")
    if width != 1.0 and name not in SCALABLE:
        raise ValueError(
            f"width must be 1 for {name!r}; only {', '.join(SCALABLE)} come narrower; got {width!r}"
        )
    if name in BUILDERS:
        return BUILDERS[name](num_classes=num_classes, **({} if width == 1.0 else {"width": width}))
    if name in TORCHVISION:
        if width != 1.0:
            return narrow_resnet(name, num_classes, width)
        import torchvision  # 2 s to import, so only where it is asked for

        return getattr(torchvision.models, name)(num_classes=num_classes)
    if name in DETECTORS:
        from lrpet.models.detectors import build_detector

        return build_detector(name, num_classes)
    if name in SEGMENTERS:
        from lrpet.models.segmenters import build_segmenter

        return build_segmenter(name, num_classes)
    kind = ValueError if isinstance(name, str) else TypeError
    known = ", ".join((*MODELS, *DETECTORS, *SEGMENTERS))
    raise kind(f"model must be one of {known}; got {name!r}")
