"""A network in training: its weights ten steps of SGD after a projection, to be put back at will."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lrpet.lowrank.projector import LowRankProjector

__all__ = ["InTraining"]


class InTraining:
    """Train a network on one batch with a projection every ten steps, and stop before the last of these.

    Args:
        network: trained in place.
        ranks: layer name → R.
        x: images, (B, C, H, W).
        projections: how many are made; the first has no earlier one to start from.

    >>> state = InTraining(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), {"0": 2}, torch.randn(2, 3, 4, 4))
    >>> state.fast.step()[0].rank
    2
    """

    def __init__(self, network: nn.Module, ranks: Mapping[str, int], x: Tensor, projections: int = 4):
        self.network, self.x, self.y = network, x, torch.randint(10, x.shape[:1], device=x.device)
        self.exact, self.fast = (LowRankProjector(network, ranks, fast=fast) for fast in (False, True))
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        for projection in range(projections + 1):
            if projection:
                self.fast.step()
            for _ in range(10):
                self.train()
        self.weights = {name: network.get_submodule(name).weight for name in ranks}
        self.moved = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self._bases, self._steps = dict(self.fast._bases), self.fast._steps

    def train(self) -> None:
        """Make one step of SGD."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.network(self.x), self.y).backward()
        self.optimizer.step()

    @torch.no_grad()
    def restore(self) -> None:
        """Put weights and bases back to where they were before the last projection."""
        for name, weight in self.weights.items():
            weight.copy_(self.moved[name])
        self.fast._bases, self.fast._steps = dict(self._bases), self._steps
