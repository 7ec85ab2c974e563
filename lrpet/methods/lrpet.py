"""LRPET and LRP: dense SGD with a projection on a schedule."""

from __future__ import annotations

import torch
from torch import nn

from lrpet.config import RunConfig
from lrpet.lowrank.factorize import factorize
from lrpet.lowrank.projector import LowRankProjector
from lrpet.lowrank.ranks import LayerReport
from lrpet.methods.base import Dense, example_input, is_due, ranks_of
from lrpet.methods.matched_steps import match_steps
from lrpet.models import unboxed
from lrpet.processes import Processes

__all__ = ["LowRankProjection"]


class LowRankProjection(Dense):
    """LRPET: dense SGD and a projection of every compressed layer on a schedule; without energy transfer LRP.

    Cost: one projection every ``projection_interval`` epochs or iterations, and always after the last step.
    With ``pretrain_epochs`` the projections begin after them: from a trained network, not from scratch.
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
        # what finds boxes or pixels cannot be traced: its BatchNorms are read off one run
        watched = config.column_scale or config.task in ("detection", "segmentation")
        example = example_input(config).to(next(model.parameters()).device) if watched else None
        self.projector = LowRankProjector(
            unboxed(model),
            self.ranks,
            energy_transfer=config.method == "lrpet",
            bn_rectification=config.bn_rectification,
            keep_share=config.residual,
            row_eps=config.row_eps,
            column_scale=bool(config.column_scale),
            fast=bool(config.fast_projection),
            example_inputs=example,
            unfolding=config.unfolding or "rows",
        )
        self.config = config
        if config.matched_steps:
            self.alone = tuple(model.get_submodule(name).weight for name in self.ranks)

    @property
    def structure(self) -> dict | None:
        """The directions that the next projection starts from, where it does."""
        return self.projector.state_dict() if self.config.fast_projection else None

    def restore(self, structure: dict | None) -> None:
        """Take back these directions."""
        if structure is not None:
            self.projector.load_state_dict(structure)

    def after_step(self, step: int, steps_per_epoch: int, last: bool) -> list[LayerReport] | None:
        """Project when the schedule says so and after the last step of all; see :class:`Dense`."""
        if step < (self.config.pretrain_epochs or 0) * steps_per_epoch:
            return None
        return self._project(exact=last) if last or is_due(self.config, step, steps_per_epoch) else None

    def _project(self, *, exact: bool) -> list[LayerReport]:
        """Let the first process project, by its BatchNorm statistics, and give its weights to all."""
        processes = Processes.now()
        reports = processes.share(lambda: self.projector.step(exact=exact))
        processes.copy_from(0, [self.model.get_submodule(name).weight for name in self.ranks])
        return reports

    def adapt(self, optimizer: torch.optim.Optimizer, reports: list[LayerReport]) -> None:
        """Let a gradient projection have new bases, with ``refresh_after_projection``.

        With ``matched_steps`` take LRPET's steps; its weights are sqrt(E / Σ_{i≤R} s_i²) as large.
        """
        if self.config.refresh_after_projection:
            optimizer.refresh_next()
        if self.config.matched_steps:
            projected = [report for report in reports if report.action == "projected"]
            weights = {report.name: self.model.get_submodule(report.name).weight for report in projected}
            match_steps(optimizer, {weights[report.name]: report.energy_kept**-0.5 for report in projected})

    def compact(self) -> nn.Module:
        """Return the factorized network."""
        return factorize(self.model, self.ranks, unfolding=self.projector.unfolding)
