"""The method on a model: which layers, which BatchNorm after each, weights of one shape decomposed in one batch."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lrpet.lowrank.batchnorm import batchnorm_scale, resolve_batchnorms
from lrpet.lowrank.follow import RESIDUAL_TOLERANCE, follow_basis
from lrpet.lowrank.projection import (
    Basis,
    gram_matrices,
    leading_basis,
    project_and_measure,
    project_on_basis_,
)
from lrpet.lowrank.ranks import LayerReport, resolve_ranks

__all__ = ["DEAD_IN_TRAINING", "LowRankProjector"]
logger = logging.getLogger("lrpet")
DEAD_IN_TRAINING = (
    1e-4  # largest singular value under which a projection leaves a layer alone (authors' code)
)
EXACT_EVERY = (
    10  # with fast=True, every so many projections take the exact path, and the fast one is compared with it
)


class LowRankProjector:
    """Projects the chosen layers of a model in place: the paper's method in an object with one verb.

    It knows of this process alone. Where several train one network, call ``step`` in one and broadcast the weights.

    Args:
        model: any ``nn.Module``; its Conv2d (one group) and Linear layers can take part.
        ranks: layer name → R, or one R for each compressible convolution in module order.
        energy_transfer: hand the removed energy to the kept singular values; False is "LRP".
        bn_rectification: project the weight as the BatchNorm behind it scales it.
        residual: q in [0, 1], the share of each removed singular value that stays.
        row_eps: constant in undoing the BatchNorm scale, see :func:`lrpet.project`.
        batchnorms: layer name → BatchNorm name or None, for models that torch.fx cannot trace.
        fast: start from the directions of the previous projection, see :func:`lrpet.lowrank.follow.follow_basis`; a layer whose result
            is not certain to be within 1e-5 of the exact one takes the exact path. Pays where few steps lie between two
            projections. Off by default: a run that is resumed then repeats the uninterrupted one bit for bit.

    Raises:
        ValueError: ranks or pairs that do not fit the model, with the names.

    Source: arXiv 2204.05566.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> projector = LowRankProjector(model, {"0": 2})
    >>> [(layer.name, layer.rank, layer.action) for layer in projector.step()]
    [('0', 2, 'projected')]
    >>> int(torch.linalg.matrix_rank(model[0].weight.flatten(1), rtol=1e-5))
    2
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Mapping[str, int] | Sequence[int],
        energy_transfer: bool = True,
        bn_rectification: bool = True,
        *,
        residual: float = 0.0,
        row_eps: float = 1e-5,
        batchnorms: Mapping[str, str | None] | None = None,
        fast: bool = False,
    ):
        self.ranks = resolve_ranks(model, ranks)
        if not isinstance(bn_rectification, bool):
            raise ValueError(f"bn_rectification must be True or False; got {bn_rectification!r}")
        self.settings = {"energy_transfer": energy_transfer, "residual": residual, "row_eps": row_eps}
        project_and_measure(torch.eye(2), 1, **self.settings)  # refuses bad settings here, not an epoch later
        modules = dict(model.named_modules())
        pairs = resolve_batchnorms(model, self.ranks, batchnorms) if bn_rectification else {}
        self._weights = {name: modules[name].weight for name in self.ranks}
        self._batchnorms = {name: modules[bn] for name, bn in pairs.items() if bn is not None}
        self.fast, self._bases, self._steps = fast, {}, 0
        self._groups = defaultdict(list)  # Gram matrices of one size, rank and place are decomposed at once
        for name, weight in self._weights.items():
            N, D = weight.flatten(1).shape
            if self.ranks[name] < min(N, D):  # elsewhere nothing is removed, so nothing is changed
                group = (N, min(N, D), self.ranks[name], weight.device, weight.dtype, name in self._batchnorms)
                self._groups[group].append(name)
        self._dense = [
            LayerReport(name, None, math.nan, "dense", "grouped" if module.groups > 1 else "no rank given")
            for name, module in modules.items()
            if isinstance(module, nn.Conv2d) and name not in self.ranks
        ]

    @torch.no_grad()
    def step(self, *, exact: bool = False) -> list[LayerReport]:
        """Project every layer in place; the optimizer's state is not touched.

        Args:
            exact: take the exact path in spite of ``fast``: to be used for the last projection of all.

        Returns:
            A report a layer, in the order of ``ranks``, then the convolutions that stay dense.

        Raises:
            ValueError: a weight or a BatchNorm holds NaN or infinity; nothing has been changed then.
        """
        scales = {
            group: batchnorm_scale(*map(self._batchnorms.get, names))
            for group, names in self._groups.items()
            if names[0] in self._batchnorms
        }
        self._refuse_lost_values(scales)
        check = exact or self._steps % EXACT_EVERY == 0
        self._steps += 1
        own = {}  # name → share of energy kept, whether it was followed, whether it is dead, its largest singular value if so
        for group, names in self._groups.items():
            matrices, a = [_as_matrix(self._weights[name]) for name in names], scales.get(group)
            basis, followed = self._find_basis(group, matrices, a, check)
            kept = torch.where(basis.energy > 0, basis.kept / basis.energy, 1.0).tolist()
            largest = _dead_matrices(matrices, a, basis.energy)
            own |= {
                name: (kept[i], followed[i], i in largest, largest.get(i, 0.0))
                for i, name in enumerate(names)
            }
            if largest:
                alive = [i for i in range(len(names)) if i not in largest]
                names, matrices = [names[i] for i in alive], [matrices[i] for i in alive]
                a, basis = None if a is None else a[alive], Basis(*(values[alive] for values in basis))
            if matrices:
                project_on_basis_(matrices, basis, row_scale=a, **self.settings)
            for name, matrix in zip(names, matrices, strict=True):
                if matrix.data_ptr() != self._weights[name].data_ptr():
                    self._weights[name].copy_(matrix.view(self._weights[name].shape))
        reports = []
        for name, rank in self.ranks.items():
            energy_kept, was_followed, dead, largest = own.get(name, (1.0, False, False, 0.0))
            if dead:
                scaled = " as its BatchNorm scales it" if name in self._batchnorms else ""
                reason = f"dead: largest singular value{scaled} {largest:.1e} < {DEAD_IN_TRAINING:.0e}"
                reports.append(LayerReport(name, rank, math.nan, "left alone", reason))
            else:
                reports.append(
                    LayerReport(name, rank, energy_kept, "projected", "followed" if was_followed else "")
                )
        return reports + self._dense

    def _find_basis(
        self, group: tuple, matrices: list[Tensor], row_scale: Tensor | None, check: bool
    ) -> tuple[Basis, list[bool]]:
        """Return the directions that the layers of a group keep, and which of them were followed from the last projection's."""
        rank, start = group[2], self._bases.get(group) if self.fast else None
        grams = lambda **options: gram_matrices(matrices, row_scale, **options)  # (B, K, K)
        if start is None:
            basis = leading_basis(grams(), rank)
            followed = [False] * len(basis.kept)
        else:
            basis, certain = follow_basis(grams(rounded=True), start)
            if check:
                G = grams()
                exact = leading_basis(G, rank)
                lost = exact.kept - ((G @ basis.vectors) * basis.vectors).sum(
                    dim=(1, 2)
                )  # Σ_{i≤R} s_i² − tr QᵀGQ
                if (
                    certain
                    & (lost > 3 * RESIDUAL_TOLERANCE * (exact.energy - exact.kept) + 1e-11 * exact.energy)
                ).any():
                    # The bound of follow_basis forbids it, so this is an error of ours, of the hardware or of a library.
                    logger.warning(
                        "the fast projection kept too little energy (%s); all projections are exact from here on",
                        self._groups[group],
                    )
                    self.fast = False
                basis, certain = exact, torch.zeros_like(certain)
            followed = certain.tolist()
            if not check and not all(followed):
                for values, exact in zip(basis, leading_basis(grams()[~certain], rank), strict=True):
                    values[~certain] = exact
        if self.fast:
            self._bases[group] = basis.vectors.to(torch.float32)
        return basis, followed

    def _refuse_lost_values(self, scales: Mapping[tuple, Tensor]) -> None:
        """Raise where a weight or a BatchNorm is not finite; norms and sums are fetched at once, in one wait for a GPU."""
        names = list(self.ranks)
        weights = [self._weights[name].detach() for name in names]
        wide = torch.promote_types(weights[0].dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm(weights, 2, wide)).double()  # one call, not one a layer
        rows = {
            name: row
            for group, a in scales.items()
            for name, row in zip(self._groups[group], a.sum(dim=1), strict=True)
        }
        none = norms.new_zeros(())
        sums = norms + torch.stack([rows.get(name, none) for name in names])
        for name, norm, both in zip(names, *torch.stack([norms, sums]).tolist(), strict=True):
            if not math.isfinite(both):
                what = "the BatchNorm after layer" if math.isfinite(norm) else "the weight of layer"
                raise ValueError(f"NaN, infinity or overflow in {what} {name!r}; nothing was projected")


def _dead_matrices(matrices: list[Tensor], row_scale: Tensor | None, energy: Tensor) -> dict[int, float]:
    """Return which of the matrices diag(a)·M are dead, with their largest singular value.

    s_1 ≥ ‖diag(a)·M‖_F / sqrt(K), so the energies, which are there already, decide for all healthy layers.
    """
    dead = {}
    for i in (energy < DEAD_IN_TRAINING**2 * min(matrices[0].shape)).nonzero().flatten().tolist():
        A = matrices[i].double() if row_scale is None else row_scale[i].unsqueeze(1) * matrices[i].double()
        largest = float(torch.linalg.matrix_norm(A, 2))
        if largest < DEAD_IN_TRAINING:
            dead[i] = largest
    return dead


def _as_matrix(weight: Tensor) -> Tensor:
    """Return a weight as N×D matrix in the same memory, if that can be; the order of columns, which changes no result, is that of the memory."""
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.permute(0, 2, 3, 1)
    return weight.detach().flatten(1)
