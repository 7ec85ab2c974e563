"""LRPET and what it is compared with, behind one small interface.

A method owns the network that is trained and says what happens to it besides the optimizer's steps:
``begin_epoch`` may replace it, ``regularize`` adds to its gradients, ``after_step`` may project it,
``compact`` returns what is deployed. All methods train for the same total of epochs, those on a dense network
first included.
"""

from __future__ import annotations

from importlib import import_module

from torch import nn

from lrpet.config import RunConfig
from lrpet.methods.base import Dense, Method, build_network, is_due, ranks_of, target_macs
from lrpet.registry import METHODS

__all__ = ["Dense", "Method", "build_network", "is_due", "make_method", "ranks_of", "target_macs"]


def make_method(model: nn.Module, config: RunConfig) -> Method:
    """Return the method that ``config.method`` names, wrapped around a fresh model of :func:`build_network`.

    >>> type(make_method(nn.Linear(2, 2), RunConfig(method="dense"))).__name__
    'Method'
    """
    module, _, name = METHODS[config.method].code.partition(":")
    return getattr(import_module(module), name)(model, config)
