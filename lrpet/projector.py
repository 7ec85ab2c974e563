"""The method on a model: which layers, which BatchNorm behind each, same shapes in one batch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lrpet.pairing import batchnorm_scale, resolve_batchnorms
from lrpet.projection import project_and_measure
from lrpet.ranks import resolve_ranks

__all__ = ["DEAD_IN_TRAINING", "LayerReport", "LowRankProjector"]

DEAD_IN_TRAINING = 1e-4  # largest singular value under which a projection leaves a layer alone (authors' code)


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer: its rank, the share of energy its kept values held, the action and why."""

    name: str
    rank: int | None  # None: the layer is dense
    energy_kept: float  # Σ_{i≤R} s_i² / E before energy transfer, 0 to 1; NaN where nothing was measured
    action: str  # projected | left alone | dense | factorized | constant
    reason: str = ""


class LowRankProjector:
    """Projects the chosen layers of a model in place: the paper's method in an object with one verb.

    Args:
        model: any ``nn.Module``; its Conv2d (one group) and Linear layers can take part.
        ranks: layer name → R, or one R for each compressible convolution in module order.
        energy_transfer: hand the removed energy to the kept singular values; False is "LRP".
        bn_rectification: project the weight as the BatchNorm behind it scales it.
        residual: q in [0, 1], the share of each removed singular value that stays.
        row_eps: constant in undoing the BatchNorm scale, see :func:`lrpet.project`.
        batchnorms: layer name → BatchNorm name or None, for models that torch.fx cannot trace.

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
        self._batches = defaultdict(list)  # layers of one shape, rank and kind are projected in one batch
        for name, weight in self._weights.items():
            kind = (weight.shape[0], weight[0].numel(), self.ranks[name], weight.device, weight.dtype, name in self._batchnorms)
            self._batches[kind].append(name)
        self._dense = [
            LayerReport(name, None, math.nan, "dense", "grouped" if module.groups > 1 else "no rank given")
            for name, module in modules.items()
            if isinstance(module, nn.Conv2d) and name not in self.ranks
        ]

    @torch.no_grad()
    def step(self) -> list[LayerReport]:
        """Project every layer in place; the optimizer's state is not touched.

        Returns:
            A report a layer, in the order of ``ranks``, then the convolutions that stay dense.

        Raises:
            ValueError: a weight or a BatchNorm holds NaN or infinity; nothing has been changed then.
        """
        scales = [
            batchnorm_scale(*[self._batchnorms[name] for name in names]) if rectified else None  # (B, N) each
            for (*_, rectified), names in self._batches.items()
        ]
        stacks = [torch.stack([self._weights[name].flatten(1) for name in names]) for names in self._batches.values()]  # (B, N, D) each
        dead = self._dead_layers(stacks, scales)
        energies = []
        for ((_, _, rank, *_), names), M, a in zip(self._batches.items(), stacks, scales, strict=True):
            projected, energy = project_and_measure(M, rank, row_scale=a, check_finite=False, **self.settings)
            for name, matrix in zip(names, projected, strict=True):
                if name not in dead:
                    self._weights[name].copy_(matrix.view(self._weights[name].shape))
            energies.append(energy)
        names = [name for batch in self._batches.values() for name in batch]
        energy_of = dict(zip(names, torch.cat([energy.cpu() for energy in energies]).tolist(), strict=True))
        reports = []
        for name, rank in self.ranks.items():
            if name in dead:
                reason = f"dead: largest singular value {dead[name]:.1e} < {DEAD_IN_TRAINING:.0e}"
                reports.append(LayerReport(name, rank, math.nan, "left alone", reason))
            else:
                reports.append(LayerReport(name, rank, energy_of[name], "projected"))
        return reports + self._dense

    def _dead_layers(self, stacks, scales) -> dict[str, float]:
        """Return the dead layers with their largest singular value, after checking that all values are finite.

        ‖M‖_F / sqrt(K) ≤ s_1 ≤ ‖M‖_F, so one norm a layer, fetched at once, decides for all healthy layers.
        """
        names = [name for batch in self._batches.values() for name in batch]
        norms = [torch.linalg.vector_norm(M, dim=(1, 2), dtype=torch.promote_types(M.dtype, torch.float32)).double() for M in stacks]
        sums = [norm if a is None else norm + a.sum(dim=1) for norm, a in zip(norms, scales, strict=True)]
        norms, sums = torch.stack([torch.cat([v.cpu() for v in norms]), torch.cat([v.cpu() for v in sums])]).tolist()
        for name, norm, both in zip(names, norms, sums, strict=True):
            if not math.isfinite(both):
                what = "the BatchNorm behind layer" if math.isfinite(norm) else "the weight of layer"
                raise ValueError(f"NaN, infinity or overflow in {what} {name!r}; nothing was projected")
        dead = {}
        for name, norm in zip(names, norms, strict=True):
            matrix = self._weights[name].flatten(1)
            if norm < DEAD_IN_TRAINING * math.sqrt(min(matrix.shape)):
                largest = float(torch.linalg.matrix_norm(matrix.double(), 2))
                if largest < DEAD_IN_TRAINING:
                    dead[name] = largest
        return dead
