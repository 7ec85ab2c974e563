"""LRPET and what it is compared with, behind one small interface.

A method owns the network that is trained and says what happens to it besides the optimizer's steps: ``begin_epoch``
may replace it, ``regularize`` adds to its gradients, ``after_step`` may project it, ``compact`` returns what is deployed.
All methods train for the same total of epochs, those on a dense network first included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lrpet.budget import closest_share
from lrpet.config import RunConfig
from lrpet.cost import cost
from lrpet.factorize import factorize, rebuild
from lrpet.filter_pruning import keep_filters, weakest_last
from lrpet.models import build_model
from lrpet.pairing import normalized_weights
from lrpet.projection import truncated_svd
from lrpet.projector import LayerReport, LowRankProjector
from lrpet.ranks import compressible_layers, ranks_from_ratio, resolve_ranks

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


def ranks_of(model: nn.Module, config: RunConfig) -> dict[str, int]:
    """Return the rank of every layer that a configuration fixes before training; empty where it fixes none.

    >>> ranks_of(nn.Sequential(nn.Conv2d(3, 16, 3)), RunConfig(prune_ratio=0.57))
    {'0': 6}
    """
    if config.ranks is not None:
        return resolve_ranks(model, config.ranks)
    return {} if config.prune_ratio is None else ranks_from_ratio(model, config.prune_ratio, layers=config.layers)


def target_macs(model: nn.Module, config: RunConfig) -> int:
    """Return the multiply-adds of an image that a configuration's ranks lead to; methods without ranks aim at them too.

    >>> config = RunConfig(dataset="cifar10", model="resnet56", prune_ratio=0.57)
    >>> round(target_macs(build_model(config.model), config) / 1e6, 2)
    56.06
    """
    return cost(model, _shape(config), ranks_of(model, config)).macs


def build_network(config: RunConfig, num_classes: int = 10) -> nn.Module:
    """Return the fresh network that a run starts from: the named one, or for ``narrow`` one of fewer channels.

    The width is the one whose multiply-adds come closest to those of the low-rank network.

    >>> build_network(RunConfig(method="narrow", prune_ratio=0.57)).conv.out_channels
    11
    """
    if config.method != "narrow":
        return build_model(config.model, num_classes)
    state = torch.get_rng_state()  # the search draws none of the numbers that the network starts from
    macs = lambda width: cost(build_model(config.model, num_classes, width), _shape(config)).macs
    width = closest_share(macs, target_macs(build_model(config.model, num_classes), config))
    torch.set_rng_state(state)
    return build_model(config.model, num_classes, width)


def _shape(config: RunConfig) -> tuple[int, int, int]:
    return (3, config.image_size, config.image_size)


class Dense:
    """Plain training of the network: the baseline, and ``narrow``, a network of fewer channels.

    Cost: that of training. Source: He et al., arXiv 1512.03385.

    >>> Dense(nn.Linear(2, 2)).ranks
    {}
    """

    ranks: dict[str, int] = {}
    undecayed: tuple[Tensor, ...] = ()  # parameters that the optimizer's weight decay leaves alone
    structure: dict | list | None = None  # what a checkpoint keeps besides weights: names, numbers, tensors; None: nothing yet

    def __init__(self, model: nn.Module):
        self.model = model

    def begin_epoch(self, epoch: int) -> bool:
        """Act before epoch number ``epoch`` (from 0); True where the network was replaced and needs a new optimizer."""
        return False

    def regularize(self) -> None:
        """Add the gradients of penalties to those of the loss, before the optimizer's step."""

    def after_step(self, step: int, steps_per_epoch: int, last: bool) -> list[LayerReport] | None:
        """Act after optimizer step number ``step`` (from 1); return the report of a projection, if one was made."""
        return None

    def compact(self) -> nn.Module:
        """Return the network that is deployed."""
        return self.model

    def restore(self, structure: dict | list | None) -> None:
        """Bring the method and the structure of its network to where a checkpoint was written; weights are loaded afterwards."""


class LowRankProjection(Dense):
    """LRPET: dense SGD with a projection of every compressed layer on a schedule; without energy transfer, LRP.

    Cost: one projection every ``projection_interval`` epochs or iterations, and always after the last step. With
    ``pretrain_epochs`` the projections begin after them: from a trained network in place of from scratch.
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
        self.config = config

    def after_step(self, step: int, steps_per_epoch: int, last: bool) -> list[LayerReport] | None:
        """Project when the schedule says so and after the last step of all; see :class:`Dense`."""
        if step < (self.config.pretrain_epochs or 0) * steps_per_epoch:
            return None
        return self.projector.step(exact=last) if last or is_due(self.config, step, steps_per_epoch) else None

    def compact(self) -> nn.Module:
        """Return the factorized network."""
        return factorize(self.model, self.ranks)


def is_due(config: RunConfig, step: int, steps_per_epoch: int) -> bool:
    """Tell whether the schedule of projections has one after optimizer step number ``step`` (from 1).

    >>> is_due(RunConfig(), step=40, steps_per_epoch=20), is_due(RunConfig(method="dense"), step=40, steps_per_epoch=20)
    (True, False)
    """
    if config.projection_interval is None:
        return False
    return step % (config.projection_interval * (steps_per_epoch if config.projection_unit == "epoch" else 1)) == 0


class TrainedRankPruning(Dense):
    """TRP: every few iterations each layer is cut to the smallest rank that leaves out at most a share of its energy.

    Between two cuts the subgradient of the nuclear norm, U·Vᵀ of the last cut, times ``nuclear_norm`` is added to the
    gradient. The threshold decides the ranks, so multiply-adds come out as they come out. A layer whose factors would cost
    no less than itself is deployed dense.

    Cost: one SVD a layer every ``projection_interval`` iterations.
    Source: Xu et al., "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", arXiv 2004.14566.

    >>> method = TrainedRankPruning(nn.Sequential(nn.Conv2d(8, 16, 3)), RunConfig(method="trp", energy_threshold=0.5))
    >>> method.after_step(step=20, steps_per_epoch=20, last=False)[0].energy_kept >= 0.5
    True
    """

    def __init__(self, model: nn.Module, config: RunConfig):
        super().__init__(model)
        self.config = config
        self.weights = {name: model.get_submodule(name).weight for name in compressible_layers(model, config.layers)}
        self.subgradients: dict[str, Tensor] = {}

    @property
    def structure(self) -> dict:
        """The ranks of the last cut and the subgradients that hold until the next."""
        return {"ranks": self.ranks, "subgradients": self.subgradients}

    def restore(self, structure: dict) -> None:
        """See :class:`Dense`."""
        self.ranks, self.subgradients = structure["ranks"], structure["subgradients"]

    @torch.no_grad()
    def regularize(self) -> None:
        """Add λ·U·Vᵀ to the gradient of each layer; see :class:`Dense`."""
        for name, subgradient in self.subgradients.items():
            self.weights[name].grad.add_(subgradient, alpha=self.config.nuclear_norm)

    @torch.no_grad()
    def after_step(self, step: int, steps_per_epoch: int, last: bool) -> list[LayerReport] | None:
        """Cut each layer when the schedule says so and after the last step of all; see :class:`Dense`."""
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


class Factorized(Dense):
    """A dense network that becomes two thin layers for each layer at the start of an epoch, and is trained on as such.

    ``svd_finetune``: after ``pretrain_epochs`` of a schedule of their own; the rest of the epochs re-trains the factors from
    ``finetune_learning_rate``. Source: Zhang et al., arXiv 1505.06798, for truncating a trained network and re-training it.

    ``warmup_switch``: in the middle of one schedule, to the given ranks or to the scaled stable rank
    ‖M‖²/s_1² · K / (its value at the start). Source: Wang et al., Pufferfish, arXiv 2103.03936; Cuttlefish, arXiv 2305.02538.

    ``factorized``: before the first step, from the SVD of the random weights (spectral initialization); with
    ``product_decay`` weight decay acts on the product of the factors. Source: Khodak et al., arXiv 2105.01029.

    Cost: one SVD a layer; the factors' training steps cost what the compact network costs. The decay on products adds four
    products of R×R matrices a layer and step.

    >>> method = Factorized(nn.Sequential(nn.Conv2d(8, 16, 3)), RunConfig(method="factorized", ranks=[2]))
    >>> method.begin_epoch(0), [tuple(p.shape) for p in method.model.parameters()]
    (True, [(2, 8, 3, 3), (16, 2, 1, 1), (16,)])
    """

    def __init__(self, model: nn.Module, config: RunConfig):
        super().__init__(model)
        self.config, self.ranks = config, ranks_of(model, config)
        if config.rank_rule == "stable_rank":
            self.stable_at_start = {name: _stable_rank(model.get_submodule(name)) for name in compressible_layers(model, config.layers)}

    def begin_epoch(self, epoch: int) -> bool:
        """Factorize when the dense epochs are over; see :class:`Dense`."""
        if self.structure is not None or epoch < (self.config.pretrain_epochs or 0):
            return False
        if self.config.rank_rule == "stable_rank":
            self.ranks = self._stable_ranks()
        self._become(factorize(self.model, self.ranks))
        return True

    def restore(self, structure: list | None) -> None:
        """See :class:`Dense`."""
        if structure is not None:
            self._become(rebuild(self.model, [LayerReport(**report) for report in structure]))

    def _become(self, compact: nn.Module) -> None:
        self.model, self.structure = compact.to(memory_format=torch.channels_last), [vars(report) for report in compact.factorization]
        self.ranks = {report.name: max(1, report.rank) for report in compact.factorization}  # a dead layer has none, and counts as one
        if self.config.product_decay:
            pairs = [self.model.get_submodule(report.name) for report in self.model.factorization if report.action == "factorized"]
            self.undecayed = tuple(factor.weight for pair in pairs for factor in pair)
            plain, normalized = self.config.weight_decay, self.config.normalized_weight_decay
            followed = set() if normalized is None else set(normalized_weights(self.model))
            self._decayed = [(*pair, normalized if pair[1].weight in followed else plain) for pair in pairs]

    @torch.no_grad()
    def regularize(self) -> None:
        """Add the gradient of λ/2·‖U·V‖², λ·U·(V·Vᵀ) and λ·(Uᵀ·U)·V, for each pair of factors; see :class:`Dense`."""
        if not self.config.product_decay:
            return
        for first, second, decay in self._decayed:
            V, U = first.weight.flatten(1), second.weight.flatten(1)  # (R, D), (N, R)
            second.weight.grad.add_((U @ (V @ V.mT)).view_as(second.weight), alpha=decay)
            first.weight.grad.add_(((U.mT @ U) @ V).view_as(first.weight), alpha=decay)

    def _stable_ranks(self) -> dict[str, int]:
        """Return ⌈K · stable rank now / at the start⌉ of each layer whose factors then cost less than itself."""
        ranks = {}
        for name, before in self.stable_at_start.items():
            layer = self.model.get_submodule(name)
            N, D = layer.weight.flatten(1).shape
            R = min(min(N, D), max(1, -int(-min(N, D) * _stable_rank(layer) / before // 1)))
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
        return tuple(part.to(weight.dtype).contiguous() for part in truncated_svd(weight.flatten(1), min(weight.flatten(1).shape)))


class SVDTraining(Factorized):
    """SVD training: U, s and V of each layer are trained in the place of its weight, then cut and trained on as two factors.

    To the loss are added ``orthogonality``·Σ (‖UᵀU − I‖² + ‖VᵀV − I‖²) / K², which keeps s singular values, and
    ``sparsity``·Σ ‖s‖₁² / ‖s‖₂², Hoyer's measure, which makes most of them small.

    Cost: three products of K×K or N×D size a layer and step. Source: Yang et al., arXiv 2004.09031.

    >>> method = SVDTraining(nn.Sequential(nn.Conv2d(8, 16, 3, bias=False)), RunConfig(method="svd_training", ranks=[2]))
    >>> [tuple(p.shape) for p in method.model.parameters()]
    [(16, 16), (16,), (16, 72)]
    """

    def __init__(self, model: nn.Module, config: RunConfig):
        super().__init__(model, config)
        for name in self.ranks:
            parametrize.register_parametrization(model.get_submodule(name), "weight", _Triplet())

    def regularize(self) -> None:
        """Add the gradients of both penalties while U, s and V are trained; see :class:`Dense`."""
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
        """See :class:`Dense`."""
        if self.structure is None and epoch >= self.config.pretrain_epochs:
            self._merge()
        return super().begin_epoch(epoch)

    def restore(self, structure: list | None) -> None:
        """See :class:`Dense`."""
        if structure is not None:
            self._merge()
        super().restore(structure)

    def _merge(self) -> None:
        for name in self.ranks:
            parametrize.remove_parametrizations(self.model.get_submodule(name), "weight")


class FilterPruning(Dense):
    """Structured pruning of a trained network: the filters of smallest L1 norm go, the rest is fine-tuned.

    Every convolution whose output channels no other layer shares loses the same share of its filters, so in a ResNet the first
    of each block, as in the source. The share is the one whose multiply-adds come closest to those of the low-rank network.

    Cost: one pass over the weights. Source: Li et al., arXiv 1608.08710; carried out by Torch-Pruning, arXiv 2301.12900.

    >>> method = FilterPruning(build_model("resnet8"), RunConfig(method="filter_pruning", prune_ratio=0.57, epochs=2, milestones=[]))
    >>> method.begin_epoch(1), method.model.blocks[0].conv1.out_channels, method.model.blocks[0].conv2.out_channels
    (True, 7, 16)
    """

    def __init__(self, model: nn.Module, config: RunConfig):
        super().__init__(model)
        self.config = config

    def begin_epoch(self, epoch: int) -> bool:
        """Prune when the dense epochs are over; see :class:`Dense`."""
        if self.structure is not None or epoch < self.config.pretrain_epochs:
            return False
        shape = _shape(self.config)
        order = weakest_last(self.model, shape)
        kept = lambda share: {name: sorted(filters[: max(1, round(share * len(filters)))]) for name, filters in order.items()}
        macs = lambda share: cost(keep_filters(self.model, kept(share), shape), shape).macs
        self.restore(kept(closest_share(macs, target_macs(self.model, self.config))))
        return True

    def restore(self, structure: dict | None) -> None:
        """See :class:`Dense`."""
        if structure is not None:
            self.model, self.structure = keep_filters(self.model, structure, _shape(self.config)), structure


def make_method(model: nn.Module, config: RunConfig) -> Dense:
    """Return the method that ``config.method`` names, wrapped around a fresh model of :func:`build_network`.

    >>> type(make_method(nn.Linear(2, 2), RunConfig(method="dense"))).__name__
    'Dense'
    """
    if config.method in ("dense", "narrow"):
        return Dense(model)
    methods = {"trp": TrainedRankPruning, "svd_training": SVDTraining, "filter_pruning": FilterPruning}
    methods |= dict.fromkeys(("lrp", "lrpet"), LowRankProjection) | dict.fromkeys(("svd_finetune", "factorized", "warmup_switch"), Factorized)
    return methods[config.method](model, config)
