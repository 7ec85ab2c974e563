"""A trained backbone from a file: the weights that a network begins with, its BatchNorms frozen or not."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import nn

__all__ = ["freeze_batchnorms", "load_backbone"]
BACKBONES = ("backbone.body", "encoder")  # of torchvision's detectors with a pyramid; of PSPNet


def backbone_of(model: nn.Module) -> nn.Module | None:
    """Return the part of a network that is trained on ImageNet, or None."""
    modules = dict(model.named_modules())
    return next((modules[name] for name in BACKBONES if name in modules), None)


def load_backbone(model: nn.Module, file: str | Path) -> None:
    """Load the weights of torchvision's ResNet, as ImageNet trained them, into a network's backbone.

    Args:
        model: a detector with a pyramid, or PSPNet; its classifier is not asked for.
        file: a state dict, ``.safetensors`` or what ``torch.save`` wrote.

    Raises:
        ValueError: it is no such file, or of another network; names what is missing.
    """
    try:
        state = load_file(file) if str(file).endswith(".safetensors") else torch.load(file, weights_only=True)
        state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
        missing, odd = backbone_of(model).load_state_dict(state, strict=False)
    except (OSError, RuntimeError, UnpicklingError, AttributeError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{file} must hold the weights of this network's backbone, as torchvision's state dicts do; "
            f"got: {str(error).splitlines()[0]}"
        ) from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or odd:
        raise ValueError(
            f"{file} holds another network than this one's backbone: {len(missing)} tensors are missing, as "
            f"{(missing or odd)[0]!r}; {len(odd)} have no place"
        )


def freeze_batchnorms(model: nn.Module) -> nn.Module:
    """Put torchvision's FrozenBatchNorm2d in the place of every BatchNorm of a detector's backbone.

    Batches of a few images are too small for statistics; those of ImageNet stay.
    """
    from torchvision.ops import FrozenBatchNorm2d

    backbone = backbone_of(model)
    for name, module in list(backbone.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(module.num_features, module.eps)
            frozen.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, frozen)
    return model
