"""torchvision's ResNets with fewer channels in every layer."""

from __future__ import annotations

from torch import nn

__all__ = ["narrow_resnet"]


def narrow_resnet(name: str, num_classes: int, width: float) -> nn.Module:
    """Build a ResNet of torchvision with a share of its channels, initialized as torchvision does.

    Args:
        name: of ``torchvision.models``.
        num_classes: width of the classifier.
        width: factor on the number of channels of every layer.

    Source: torchvision.models.resnet, He et al., 2015.

    >>> network = narrow_resnet("resnet18", 10, 0.5)
    >>> network.conv1.out_channels, network.fc.in_features
    (32, 256)
    """
    import torchvision  # 2 s to import, so only where it is asked for

    network = getattr(torchvision.models, name)(num_classes=num_classes)

    def share(channels: int) -> int:
        return max(1, round(width * channels))

    for path, layer in list(network.named_modules()):
        if isinstance(layer, nn.Conv2d):
            inputs = layer.in_channels if path == "conv1" else share(layer.in_channels)
            shape = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding}
            new = nn.Conv2d(inputs, share(layer.out_channels), **shape, bias=False)
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm2d):
            new = nn.BatchNorm2d(share(layer.num_features))
        else:
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(network.get_submodule(parent), leaf, new)
    network.fc = nn.Linear(share(network.fc.in_features), num_classes)
    return network
