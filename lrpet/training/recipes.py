"""How a network is trained: optimizer, learning rate over time, loss and mixing of images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lrpet.config import RunConfig
from lrpet.lowrank.batchnorm import normalized_weights
from lrpet.lowrank.gradient_projection import GradientProjection, projection_groups
from lrpet.registry import BLOCKS, GRADIENT_PROJECTIONS

__all__ = [
    "augmentation",
    "learning_rate",
    "make_mixer",
    "make_optimizer",
    "seed_step",
    "set_learning_rate",
    "training_loss",
]
# Recipe adamw: the vision transformer of arXiv 2204.05566 as its authors' code trains it.
PASSES = 3  # over the images in an epoch: repeated augmentation
WARMUP_SHARE = 0.1  # of the epochs: 10 of 100
LABEL_SMOOTHING = 0.1
MIXED = 0.5  # share of the batches that are mixed, half of them by each way
MIXUP, CUTMIX = 1.0, 1.0  # α of each
ERASED = 0.25  # share of the images
ERASING = {"scale": (0.02, 0.4), "ratio": (0.3, 1 / 0.3)}  # share of the image's area; height to width


def augmentation(config: RunConfig) -> dict[str, int | bool]:
    """Return how :func:`lrpet.data.load.make_batches` serves the images of a recipe.

    >>> augmentation(RunConfig(recipe="adamw"))
    {'passes': 3, 'autoaugment': True}
    """
    return {} if config.recipe != "adamw" else {"passes": PASSES, "autoaugment": True}


def seed_step(config: RunConfig, step: int, rank: int = 0) -> None:
    """Seed what is drawn in a training step, on every device, by (seed, step, rank) alone.

    So a run resumes at any step bit for bit, and needs no state of a generator for it.

    Args:
        config: of the run.
        step: from 0, over all epochs.
        rank: of the process, which draws for its own part of a batch.

    >>> config, draws = RunConfig(), []
    >>> for step in (7, 8, 7):
    ...     seed_step(config, step)
    ...     draws.append(torch.rand(()).item())
    >>> draws[0] == draws[2] != draws[1]
    True
    """
    digest = hashlib.sha256(f"{config.seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7]))


def learning_rate(config: RunConfig, epoch: int, within: float = 0.5) -> float:
    """Return the learning rate of a step.

    ``sgd``: a tenth after each milestone. Else a linear warm-up over a tenth of the epochs, then half a
    cosine to 0, both step by step. With a ``finetune_learning_rate`` the same schedule runs twice, shortened
    to fit: over ``pretrain_epochs``, then from that rate over the epochs that are left.

    Args:
        config: of the run.
        epoch: from 0.
        within: where in the epoch the middle of the step lies, between 0 and 1; ``sgd`` does not ask.

    Source: arXiv 2204.05566, experimental settings; its authors' code for AdamW.

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
    now, warmup = epoch + within, WARMUP_SHARE * epochs
    if now < warmup:
        return peak * now / warmup
    return peak * (1 + math.cos(math.pi * (now - warmup) / (epochs - warmup))) / 2


def make_optimizer(
    config: RunConfig,
    model: nn.Module,
    device: torch.device,
    undecayed: Collection[Tensor] = (),
    alone: Collection[Tensor] = (),
) -> torch.optim.Optimizer:
    """Return the optimizer of a run, with weight decay on all parameters.

    SGD with momentum, AdamW or Adafactor; with ``gradient_projection`` AdamW whose moments of the block
    matrices live in a subspace.

    Parameters in ``undecayed`` are spared it; their method has a decay of its own. Weights that a
    BatchNorm follows take ``normalized_weight_decay`` where it is given: their norm changes nothing but the
    size of a step relative to it. Parameters in ``alone`` are each a group of their own.

    >>> type(make_optimizer(RunConfig(), nn.Linear(2, 2), torch.device("cpu"))).__name__
    'SGD'
    """
    if config.gradient_projection is not None:
        return _projecting_optimizer(config, model)
    fused = device.type == "cuda"
    spared = {id(p) for p in undecayed}
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
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.learning_rate)
    if config.recipe == "sgd" or config.optimizer == "sgd":
        momentum = {"momentum": config.momentum, "nesterov": config.nesterov}
        return torch.optim.SGD(groups, lr=config.learning_rate, fused=fused, **momentum)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused, capturable=fused)


# fields of RunConfig → settings of GradientProjection
GRADIENT_SETTINGS = {
    "gradient_rank": "rank",
    "gradient_interval": "every",
    "gradient_scale": "scale",
    "grain": "grain",
    "switch_threshold": "threshold",
    "check_interval": "check",
    "carry": "carry",
}


def _projecting_optimizer(config: RunConfig, model: nn.Module) -> GradientProjection:
    strategy = config.gradient_projection
    settings = {
        GRADIENT_SETTINGS[name]: getattr(config, name) for name in GRADIENT_PROJECTIONS[strategy].reads
    }
    scale = settings.pop("scale") if strategy == "vlorp" else None  # it has no α of its own
    groups = projection_groups(model, strategy, include=BLOCKS[config.model], **settings)
    together = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    optimizer = GradientProjection(
        groups, lr=config.learning_rate, weight_decay=config.weight_decay, seed=config.seed, group=together
    )
    if scale is not None:
        optimizer.param_groups[0]["lr_scale"] = scale
    return optimizer


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


def make_mixer(
    config: RunConfig, num_classes: int, fill: Sequence[float] = (0.0,)
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return what mixes a batch (B, 3, H, W), (B,): nothing for SGD; AdamW erases, then mixup or cutmix.

    A quarter of the images have a rectangle erased, each one of its own. Half of the batches are mixed, with
    one draw for all of a batch. Labels become shares, (B, num_classes), mixed or not.

    Args:
        config: of the run.
        num_classes: of the data.
        fill: what a rectangle is erased with, a number for each channel or one for all.

    >>> x, y = make_mixer(RunConfig(), 10)(torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]))
    >>> y
    tensor([1, 2])
    """
    if config.recipe != "adamw":
        return lambda x, y: (x, y)
    from torchvision.transforms import v2

    mix = v2.RandomChoice(
        [v2.MixUp(alpha=MIXUP, num_classes=num_classes), v2.CutMix(alpha=CUTMIX, num_classes=num_classes)]
    )
    erase, colour = v2.RandomErasing(p=1.0, **ERASING), torch.tensor(fill)[:, None, None]

    def mixer(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        left = torch.ones(len(x), 1, *x.shape[2:])  # on the CPU: rectangles one by one, one transfer for all
        for i in (torch.rand(len(x)) < ERASED).nonzero().flatten().tolist():
            left[i] = erase(left[i])
        x = torch.where(left.to(x.device) > 0, x, colour.to(x.device))
        x = x.contiguous(memory_format=torch.channels_last)
        if len(x) and torch.rand(()) < MIXED:
            return mix(x, y)
        return x, F.one_hot(y, num_classes).to(x.dtype)

    return mixer


def training_loss(config: RunConfig, logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of logits (B, classes) and targets, (B,) or such; smoothed for AdamW."""
    return F.cross_entropy(
        logits, target, label_smoothing=LABEL_SMOOTHING if config.recipe == "adamw" else 0.0
    )
