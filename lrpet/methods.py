"""LRPET and what it is compared with, behind one small interface.

A method owns the model that is trained and says what happens to it besides the optimizer's steps:
``after_step`` is called after each of them, ``compact`` returns the network that is deployed.
"""

from __future__ import annotations

from torch import nn

from lrpet.config import RunConfig
from lrpet.factorize import factorize
from lrpet.projector import LayerReport, LowRankProjector
from lrpet.ranks import ranks_from_ratio, resolve_ranks

__all__ = ["Dense", "LowRankProjection", "make_method", "ranks_of"]


def ranks_of(model: nn.Module, config: RunConfig) -> dict[str, int]:
    """Return the rank of every layer that a configuration compresses; empty for the dense network.

    >>> ranks_of(nn.Sequential(nn.Conv2d(3, 16, 3)), RunConfig(prune_ratio=0.57))
    {'0': 6}
    """
    if config.method == "dense":
        return {}
    return ranks_from_ratio(model, config.prune_ratio, layers=config.layers) if config.ranks is None else resolve_ranks(model, config.ranks)


class Dense:
    """Plain training of the full network; the baseline.

    Cost: that of training. Source: He et al., arXiv 1512.03385.

    >>> Dense(nn.Linear(2, 2)).ranks
    {}
    """

    ranks: dict[str, int] = {}

    def __init__(self, model: nn.Module):
        self.model = model

    def after_step(self, step: int, steps_per_epoch: int, last: bool) -> list[LayerReport] | None:
        """Act after optimizer step number ``step`` (from 1); return the report of a projection, if one was made."""
        return None

    def compact(self) -> nn.Module:
        """Return the network that is deployed."""
        return self.model


class LowRankProjection(Dense):
    """LRPET: dense SGD with a projection of every compressed layer on a schedule; without energy transfer, LRP.

    Cost: one projection every ``projection_interval`` epochs or iterations, and always after the last step.
    Source: arXiv 2204.05566.

    >>> from lrpet.models import build_model
    >>> method = LowRankProjection(build_model("resnet8"), RunConfig(prune_ratio=0.57))
    >>> method.after_step(step=1, steps_per_epoch=20, last=False) is None
    True
    >>> method.after_step(step=20, steps_per_epoch=20, last=False)[0].rank
    6
    """

    def __init__(self, model: nn.Module, config: RunConfig):
        super().__init__(model)
        self.ranks = ranks_of(model, config)
        self.projector = LowRankProjector(
            model,
            self.ranks,
            energy_transfer=config.method == "lrpet",
            bn_rectification=config.bn_rectification,
            residual=config.residual,
            row_eps=config.row_eps,
        )
        self.interval, self.unit = config.projection_interval, config.projection_unit

    def after_step(self, step: int, steps_per_epoch: int, last: bool) -> list[LayerReport] | None:
        """Project when the schedule says so and after the last step of all; see :class:`Dense`."""
        interval = self.interval * (steps_per_epoch if self.unit == "epoch" else 1)
        return self.projector.step() if last or step % interval == 0 else None

    def compact(self) -> nn.Module:
        """Return the factorized network."""
        return factorize(self.model, self.ranks)


def make_method(model: nn.Module, config: RunConfig) -> Dense:
    """Return the method that ``config.method`` names, wrapped around a fresh model.

    >>> type(make_method(nn.Linear(2, 2), RunConfig(method="dense"))).__name__
    'Dense'
    """
    return Dense(model) if config.method == "dense" else LowRankProjection(model, config)
