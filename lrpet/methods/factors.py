"""Networks that are trained as factors, from the start or from some epoch on."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lrpet.config import RunConfig
from lrpet.lowrank.batchnorm import normalized_weights
from lrpet.lowrank.factorize import factorize
from lrpet.lowrank.factors import rebuild
from lrpet.lowrank.projection import truncated_svd
from lrpet.lowrank.ranks import LayerReport, compressible_layers
from lrpet.methods.base import Method, ranks_of

__all__ = ["Factorized", "SVDTraining"]


class Factorized(Method):
    """A network whose layers become two thin layers each at the start of an epoch, and are trained as such.

    ``svd_finetune``: after ``pretrain_epochs`` of a schedule of their own; the rest of the epochs trains the
    factors from ``finetune_learning_rate``. Source: Zhang et al., arXiv 1505.06798: truncate a trained
    network, train it again.

    ``warmup_switch``: in the middle of one schedule, to the given ranks or to the scaled stable rank
    ‖M‖²/s_1² · K / (its value at the start). Source: Wang et al., Pufferfish, arXiv 2103.03936; Cuttlefish,
    arXiv 2305.02538.

    ``factorized``: before the first step, from the SVD of the random weights (spectral initialization); with
    ``product_decay`` weight decay acts on the product of the factors. Source: Khodak et al., arXiv
    2105.01029.

    Cost: one SVD per layer; the factors' training steps cost what the compact network costs. The decay on
    products adds four products of R×R matrices per layer and step.

    >>> method = Factorized(nn.Sequential(nn.Conv2d(8, 16, 3)), RunConfig(method="factorized", ranks=[2]))
    >>> method.begin_epoch(0), [tuple(p.shape) for p in method.model.parameters()]
    (True, [(2, 8, 3, 3), (16, 2, 1, 1), (16,)])
    """

    def __init__(self, model: nn.Module, config: RunConfig):
        super().__init__(model, config)
        self.ranks = ranks_of(model, config)
        if config.rank_rule == "stable_rank":
            self.stable_at_start = {
                name: _stable_rank(model.get_submodule(name))
                for name in compressible_layers(model, config.layers, config.dense_layers or ())
            }

    def begin_epoch(self, epoch: int) -> bool:
        """Factorize when the dense epochs are over; see :class:`Method`."""
        if self.structure is not None or epoch < (self.config.pretrain_epochs or 0):
            return False
        if self.config.rank_rule == "stable_rank":
            self.ranks = self._stable_ranks()
        self._become(factorize(self.model, self.ranks))
        return True

    def restore(self, structure: list | None) -> None:
        """See :class:`Method`."""
        if structure is not None:
            self._become(rebuild(self.model, [LayerReport(**report) for report in structure]))

    def _become(self, compact: nn.Module) -> None:
        self.model = compact.to(memory_format=torch.channels_last)
        self.structure = [vars(report) for report in compact.factorization]
        # a dead layer has no rank, and counts as one
        self.ranks = {report.name: max(1, report.rank) for report in compact.factorization}
        if self.config.product_decay:
            reports = [report for report in compact.factorization if report.action == "factorized"]
            pairs = [self.model.get_submodule(report.name) for report in reports]
            self.undecayed = tuple(factor.weight for pair in pairs for factor in pair)
            plain, normalized = self.config.weight_decay, self.config.normalized_weight_decay
            followed = set() if normalized is None else set(normalized_weights(self.model))
            self._decayed = [(*pair, normalized if pair[1].weight in followed else plain) for pair in pairs]

    @torch.no_grad()
    def regularize(self) -> None:
        """Add the gradient of λ/2·‖U·V‖² per pair of factors: λ·U·(V·Vᵀ), λ·(Uᵀ·U)·V; see :class:`Method`."""
        if not self.config.product_decay:
            return
        for first, second, decay in self._decayed:
            V, U = first.weight.flatten(1), second.weight.flatten(1)  # (R, D), (N, R)
            second.weight.grad.add_((U @ (V @ V.mT)).view_as(second.weight), alpha=decay)
            first.weight.grad.add_(((U.mT @ U) @ V).view_as(first.weight), alpha=decay)

    def _stable_ranks(self) -> dict[str, int]:
        """Return ⌈K · stable rank now / at the start⌉ per layer whose factors then cost less than itself."""
        ranks = {}
        for name, before in self.stable_at_start.items():
            layer = self.model.get_submodule(name)
            N, D = layer.weight.flatten(1).shape
            R = min(min(N, D), max(1, math.ceil(min(N, D) * _stable_rank(layer) / before)))
            if R * (N + D) < N * D:
                ranks[name] = R
        return ranks


@torch.no_grad()
def _stable_rank(layer: nn.Module) -> float:
    """Return ‖M‖_F² / s_1²."""
    s = torch.linalg.svdvals(layer.weight.flatten(1).double())  # (K,)
    return float(s.square().sum() / s[0].square())


class _Triplet(nn.Module):
    """A weight as U·diag(s)·Vᵀ, from its SVD."""

    def forward(self, U: Tensor, s: Tensor, Vh: Tensor) -> Tensor:
        with torch.autocast(U.device.type, enabled=False):
            return ((U * s) @ Vh).view(self.shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.shape = weight.shape
        M = weight.flatten(1)  # (N, D)
        return tuple(part.to(weight.dtype).contiguous() for part in truncated_svd(M, min(M.shape)))


class SVDTraining(Factorized):
    """SVD training: U, s and V are trained in place of each weight, then cut and trained as two factors.

    To the loss are added ``orthogonality``·Σ (‖UᵀU − I‖² + ‖VᵀV − I‖²) / K², which keeps s singular values,
    and ``sparsity``·Σ ‖s‖₁² / ‖s‖₂², Hoyer's measure, which makes most of them small.

    Cost: three products of K×K or N×D size per layer and step. Source: Yang et al., arXiv 2004.09031.

    >>> config = RunConfig(method="svd_training", ranks=[2])
    >>> method = SVDTraining(nn.Sequential(nn.Conv2d(8, 16, 3, bias=False)), config)
    >>> [tuple(p.shape) for p in method.model.parameters()]
    [(16, 16), (16,), (16, 72)]
    """

    def __init__(self, model: nn.Module, config: RunConfig):
        super().__init__(model, config)
        for name in self.ranks:
            parametrize.register_parametrization(model.get_submodule(name), "weight", _Triplet())

    def regularize(self) -> None:
        """Add the gradients of both penalties while U, s and V are trained; see :class:`Method`."""
        if self.structure is not None:
            return
        penalty = 0.0
        for name in self.ranks:
            weight = self.model.get_submodule(name).parametrizations.weight
            U, s, Vh = weight.original0, weight.original1, weight.original2  # (N, K), (K,), (K, D)
            eye = torch.eye(len(s), device=s.device)
            skew = (U.mT @ U - eye).square().sum() + (Vh @ Vh.mT - eye).square().sum()
            hoyer = s.abs().sum().square() / s.square().sum().clamp(min=torch.finfo(s.dtype).tiny)
            penalty = penalty + self.config.orthogonality * skew / len(s) ** 2 + self.config.sparsity * hoyer
        penalty.backward()

    def begin_epoch(self, epoch: int) -> bool:
        """See :class:`Method`."""
        if self.structure is None and epoch >= self.config.pretrain_epochs:
            self._merge()
        return super().begin_epoch(epoch)

    def restore(self, structure: list | None) -> None:
        """See :class:`Method`."""
        if structure is not None:
            self._merge()
        super().restore(structure)

    def _merge(self) -> None:
        for name in self.ranks:
            parametrize.remove_parametrizations(self.model.get_submodule(name), "weight")
