"""How a network is trained: optimizer, learning rate over time, loss and mixing of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrpet.config import RunConfig
from lrpet.lowrank.batchnorm import normalized_weights

__all__ = ["learning_rate", "make_mixer", "make_optimizer", "set_learning_rate", "training_loss"]
WARMUP_SHARE = 0.05  # of the epochs, for AdamW
# usual for small vision transformers: arXiv 2012.12877, table 9
LABEL_SMOOTHING, MIXUP, CUTMIX, ERASING = 0.1, 0.8, 1.0, 0.25


def learning_rate(config: RunConfig, epoch: int) -> float:
    """Return the learning rate of an epoch (from 0).

    ``sgd``: a tenth after each milestone. ``adamw``: a linear warm-up over 5 % of the epochs, then half a
    cosine to 0. With a ``finetune_learning_rate`` the same schedule runs twice, shortened to fit: over
    ``pretrain_epochs``, then from that rate over the epochs that are left.

    Source: arXiv 2204.05566, experimental settings; arXiv 2012.12877 for AdamW.

    >>> [learning_rate(RunConfig(epochs=4, milestones=[2, 3]), epoch) for epoch in range(4)]
    [0.1, 0.1, 0.01, 0.001]
    """
    peak, epochs = config.learning_rate, config.epochs
    if config.finetune_learning_rate is not None:
        if epoch < config.pretrain_epochs:
            epochs = config.pretrain_epochs
        else:
            peak = config.finetune_learning_rate
            epoch, epochs = epoch - config.pretrain_epochs, epochs - config.pretrain_epochs
    if config.recipe == "sgd":
        return peak / 10 ** sum(
            epoch * config.epochs >= milestone * epochs for milestone in config.milestones
        )
    warmup = max(1, round(WARMUP_SHARE * epochs))
    if epoch < warmup:
        return peak * (epoch + 1) / warmup
    return peak * (1 + math.cos(math.pi * (epoch - warmup) / max(1, epochs - warmup))) / 2


def make_optimizer(
    config: RunConfig,
    model: nn.Module,
    device: torch.device,
    undecayed: Collection[Tensor] = (),
    alone: Collection[Tensor] = (),
) -> torch.optim.Optimizer:
    """Return SGD with momentum, or AdamW that spares vectors (biases, norms) the weight decay.

    Parameters in ``undecayed`` are spared it too; their method has a decay of its own. Weights that a
    BatchNorm follows take ``normalized_weight_decay`` where it is given: their norm changes nothing but the
    size of a step relative to it. Parameters in ``alone`` are each a group of their own.

    >>> type(make_optimizer(RunConfig(), nn.Linear(2, 2), torch.device("cpu"))).__name__
    'SGD'
    """
    fused = device.type == "cuda"
    spared = {id(p) for p in undecayed} | (
        {id(p) for p in model.parameters() if p.ndim <= 1} if config.recipe == "adamw" else set()
    )
    decays = dict.fromkeys(model.parameters(), config.weight_decay)
    if config.normalized_weight_decay is not None:
        decays |= dict.fromkeys(normalized_weights(model), config.normalized_weight_decay)
    decays |= {p: 0.0 for p in model.parameters() if id(p) in spared}
    own = {id(p) for p in alone}
    groups = [
        {"params": [p for p in decays if decays[p] == decay and id(p) not in own], "weight_decay": decay}
        for decay in dict.fromkeys(decays.values())
    ]
    groups += [{"params": [p], "weight_decay": decays[p]} for p in alone]
    groups = [group for group in groups if group["params"]]
    if config.recipe == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused, capturable=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float, device: torch.device) -> None:
    """Set the learning rate of all parameters, times the ``lr_scale`` of their group where it has one.

    On a GPU it is a tensor, which a recorded step reads anew each time.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    >>> set_learning_rate(optimizer, 0.01, torch.device("cpu"))
    >>> optimizer.param_groups[0]["lr"]
    0.01
    """
    for group in optimizer.param_groups:
        rate = value * group.get("lr_scale", 1.0)
        if device.type == "cpu":
            group["lr"] = rate
        elif isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = torch.tensor(rate, device=device)


def make_mixer(config: RunConfig, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return what mixes a batch (B, 3, H, W), (B,): nothing for SGD; mixup or cutmix, and erasing, for AdamW.

    The mixed labels are shares, (B, num_classes). One draw serves a whole batch, as torchvision's transforms
    do it.

    >>> x, y = make_mixer(RunConfig(), 10)(torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]))
    >>> y
    tensor([1, 2])
    """
    if config.recipe == "sgd":
        return lambda x, y: (x, y)
    from torchvision.transforms import v2

    mix = v2.RandomChoice(
        [v2.MixUp(alpha=MIXUP, num_classes=num_classes), v2.CutMix(alpha=CUTMIX, num_classes=num_classes)]
    )
    erase = v2.RandomErasing(p=ERASING)

    def mixer(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return mix(erase(x), y)

    return mixer


def training_loss(config: RunConfig, logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of logits (B, classes) and targets, (B,) or such; smoothed for AdamW."""
    return F.cross_entropy(logits, target, label_smoothing=0.0 if config.recipe == "sgd" else LABEL_SMOOTHING)
