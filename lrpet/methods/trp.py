"""Trained Rank Pruning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrpet.config import RunConfig
from lrpet.lowrank.factorize import factorize
from lrpet.lowrank.projection import truncated_svd
from lrpet.lowrank.ranks import LayerReport, compressible_layers
from lrpet.methods.base import Method, is_due

__all__ = ["TrainedRankPruning"]


class TrainedRankPruning(Method):
    """TRP: every few iterations each layer is cut to the smallest rank that drops at most a share of energy.

    Between two cuts the subgradient of the nuclear norm, U·Vᵀ of the last cut, times ``nuclear_norm`` is
    added to the gradient. The threshold decides the ranks, so multiply-adds come out as they come out. A
    layer whose factors would cost no less than itself is deployed dense.

    Cost: one SVD per layer every ``projection_interval`` iterations.
    Source: Xu et al., "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", arXiv 2004.14566.

    >>> config = RunConfig(method="trp", energy_threshold=0.5)
    >>> method = TrainedRankPruning(nn.Sequential(nn.Conv2d(8, 16, 3)), config)
    >>> method.after_step(step=20, steps_per_epoch=20, last=False)[0].energy_kept >= 0.5
    True
    """

    def __init__(self, model: nn.Module, config: RunConfig):
        super().__init__(model, config)
        names = compressible_layers(model, config.layers, config.dense_layers or ())
        self.weights = {name: model.get_submodule(name).weight for name in names}
        self.subgradients: dict[str, Tensor] = {}

    @property
    def structure(self) -> dict:
        """The ranks of the last cut and the subgradients that hold until the next."""
        return {"ranks": self.ranks, "subgradients": self.subgradients}

    def restore(self, structure: dict) -> None:
        """See :class:`Method`."""
        self.ranks, self.subgradients = structure["ranks"], structure["subgradients"]

    @torch.no_grad()
    def regularize(self) -> None:
        """Add λ·U·Vᵀ to the gradient of each layer; see :class:`Method`."""
        for name, subgradient in self.subgradients.items():
            self.weights[name].grad.add_(subgradient, alpha=self.config.nuclear_norm)

    @torch.no_grad()
    def after_step(self, step: int, steps_per_epoch: int, last: bool) -> list[LayerReport] | None:
        """Cut each layer when the schedule says so and after the last step of all; see :class:`Method`."""
        if not last and not is_due(self.config, step, steps_per_epoch):
            return None
        reports = []
        for name, weight in self.weights.items():
            M = weight.flatten(1)  # (N, D)
            N, D = M.shape
            U, s, Vh = truncated_svd(M, min(N, D))
            energy = s.square().cumsum(0) / s.square().sum().clamp(min=torch.finfo(s.dtype).tiny)  # (K,)
            R = min(min(N, D), int((energy < 1 - self.config.energy_threshold).sum()) + 1)
            weight.copy_((U[:, :R] * s[:R] @ Vh[:R]).view(weight.shape))
            if self.config.nuclear_norm:
                self.subgradients[name] = (U[:, :R] @ Vh[:R]).to(weight.dtype).view(weight.shape)
            reports.append(LayerReport(name, R, float(energy[R - 1]), "projected"))
            if R * (N + D) < N * D:
                self.ranks = self.ranks | {name: R}
            else:
                self.ranks = {layer: rank for layer, rank in self.ranks.items() if layer != name}
        return reports

    def compact(self) -> nn.Module:
        """Return the network factorized at the ranks of the last cut."""
        return factorize(self.model, self.ranks)
