"""What every method offers, and the baseline: plain training."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from lrpet.config import RunConfig
from lrpet.lowrank.budget import closest_share
from lrpet.lowrank.cost import Cost, cost
from lrpet.lowrank.ranks import LayerReport, ranks_from_ratio, resolve_ranks
from lrpet.models import build_model, unboxed

__all__ = [
    "Dense",
    "Method",
    "build_network",
    "count_cost",
    "dense_network",
    "example_input",
    "is_due",
    "ranks_of",
    "target_macs",
]


def ranks_of(model: nn.Module, config: RunConfig) -> dict[str, int]:
    """Return the rank of every layer that a configuration fixes before training; empty where it fixes none.

    >>> ranks_of(nn.Sequential(nn.Conv2d(3, 16, 3)), RunConfig(prune_ratio=0.57))
    {'0': 6}
    """
    if config.ranks is not None:
        return resolve_ranks(model, config.ranks, config.unfolding or "rows")
    if config.prune_ratio is None:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tables and layers.csv tell what a ratio costs
        choice = {"multiple_of": config.multiple_of or 1, "unfolding": config.unfolding or "rows"}
        choice |= {"include": config.layers, "exclude": config.dense_layers or ()}
        return ranks_from_ratio(model, config.prune_ratio, **choice)


def target_macs(model: nn.Module, config: RunConfig) -> int:
    """Return the multiply-adds for one input that a configuration's ranks lead to; others aim at them.

    >>> config = RunConfig(dataset="cifar10", model="resnet56", prune_ratio=0.57)
    >>> round(target_macs(build_model(config.model), config) / 1e6, 2)
    56.06
    """
    return count_cost(model, config, ranks_of(model, config)).macs


def dense_network(config: RunConfig, num_classes: int = 10) -> nn.Module:
    """Return the named network with fresh random weights, as wide as it is published.

    >>> dense_network(RunConfig()).conv.out_channels
    16
    """
    model = build_model(config.model, num_classes)
    if config.pretrained_backbone and config.task == "detection":
        from lrpet.models.pretrained import freeze_batchnorms

        return freeze_batchnorms(model)
    return model


def build_network(config: RunConfig, num_classes: int = 10) -> nn.Module:
    """Return the fresh network that a run starts from: the named one; for ``narrow`` one of fewer channels.

    The width is the one whose multiply-adds come closest to those of the low-rank network.

    >>> build_network(RunConfig(method="narrow", prune_ratio=0.57)).conv.out_channels
    11
    """
    if config.method != "narrow":
        return dense_network(config, num_classes)
    state = torch.get_rng_state()  # the search draws none of the numbers that the network starts from

    def macs(width: float) -> int:
        return count_cost(build_model(config.model, num_classes, width), config).macs

    width = closest_share(macs, target_macs(build_model(config.model, num_classes), config))
    torch.set_rng_state(state)
    return build_model(config.model, num_classes, width)


def example_input(config: RunConfig) -> Tensor:
    """Return what a network reads at once, zeros: an image (1, C, H, W), or a window of text (1, T), int64.

    >>> example_input(RunConfig()).shape
    torch.Size([1, 3, 8, 8])
    """
    if config.task == "language":
        return torch.zeros(1, config.context, dtype=torch.int64)
    return torch.zeros(1, *image_shape(config))


def count_cost(model: nn.Module, config: RunConfig, ranks: dict[str, int] | None = None) -> Cost:
    """Return multiply-adds and parameters for one image, of a detector without its choices, or one text."""
    unfolding = "rows" if ranks is None else config.unfolding or "rows"
    return cost(unboxed(model), ranks=ranks, example_inputs=example_input(config), unfolding=unfolding)


def image_shape(config: RunConfig) -> tuple[int, int, int]:
    """Return (C, H, W) of one image."""
    return (3, config.image_size, config.image_size)


class Method:
    """What every method offers, and plain training: the baseline ``dense``; ``narrow``, of fewer channels.

    Cost: that of training. Source: He et al., arXiv 1512.03385.

    >>> Method(nn.Linear(2, 2)).ranks
    {}
    """

    ranks: dict[str, int] = {}
    undecayed: tuple[Tensor, ...] = ()  # parameters that the optimizer's weight decay leaves alone
    alone: tuple[Tensor, ...] = ()  # parameters that are each a group of their own in the optimizer
    structure: dict | list | None = None  # what a checkpoint keeps besides weights; None: nothing yet

    def __init__(self, model: nn.Module, config: RunConfig | None = None):
        self.model, self.config = model, config

    def begin_epoch(self, epoch: int) -> bool:
        """Act before epoch ``epoch`` (from 0); True where a new network needs a new optimizer."""
        return False

    def regularize(self) -> None:
        """Add the gradients of penalties to those of the loss, before the optimizer's step."""

    def after_step(self, step: int, steps_per_epoch: int, last: bool) -> list[LayerReport] | None:
        """Act after optimizer step ``step`` (from 1); return the report of a projection, if one was made."""
        return None

    def adapt(self, optimizer: torch.optim.Optimizer, reports: list[LayerReport]) -> None:
        """Act on the optimizer after a projection."""

    def compact(self) -> nn.Module:
        """Return the network that is deployed."""
        return self.model

    def restore(self, structure: dict | list | None) -> None:
        """Bring method and network to the structure that a checkpoint has; weights are loaded afterwards."""


Dense = Method


def is_due(config: RunConfig, step: int, steps_per_epoch: int) -> bool:
    """Tell whether the schedule of projections has one after optimizer step number ``step`` (from 1).

    >>> [is_due(RunConfig(method=method), step=40, steps_per_epoch=20) for method in ("lrpet", "dense")]
    [True, False]
    """
    if config.projection_interval is None:
        return False
    unit = steps_per_epoch if config.projection_unit == "epoch" else 1
    return step % (config.projection_interval * unit) == 0
