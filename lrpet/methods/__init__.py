"""LRPET and what it is compared with, behind one small interface.

A method owns the network that is trained and says what happens to it besides the optimizer's steps: ``begin_epoch``
may replace it, ``regularize`` adds to its gradients, ``after_step`` may project it, ``compact`` returns what is deployed.
All methods train for the same total of epochs, those on a dense network first included.
"""

from __future__ import annotations

from torch import nn

from lrpet.config import RunConfig
from lrpet.methods.base import Dense, build_network, is_due, ranks_of, target_macs
from lrpet.methods.factors import Factorized, SVDTraining
from lrpet.methods.filter_pruning import FilterPruning
from lrpet.methods.lrpet import LowRankProjection
from lrpet.methods.trp import TrainedRankPruning

__all__ = [
    "Dense",
    "Factorized",
    "FilterPruning",
    "LowRankProjection",
    "SVDTraining",
    "TrainedRankPruning",
    "build_network",
    "is_due",
    "make_method",
    "ranks_of",
    "target_macs",
]


def make_method(model: nn.Module, config: RunConfig) -> Dense:
    """Return the method that ``config.method`` names, wrapped around a fresh model of :func:`build_network`.

    >>> type(make_method(nn.Linear(2, 2), RunConfig(method="dense"))).__name__
    'Dense'
    """
    if config.method in ("dense", "narrow"):
        return Dense(model)
    methods = {"trp": TrainedRankPruning, "svd_training": SVDTraining, "filter_pruning": FilterPruning}
    methods |= dict.fromkeys(("lrp", "lrpet"), LowRankProjection) | dict.fromkeys(
        ("svd_finetune", "factorized", "warmup_switch"), Factorized
    )
    return methods[config.method](model, config)
