"""The whole method in one object, for any training loop: ranks, schedule, last projection, factorization."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lrpet.lowrank.arguments import check, is_whole
from lrpet.lowrank.budget import ranks_for_budget
from lrpet.lowrank.factorize import factorize
from lrpet.lowrank.layers import unwrap
from lrpet.lowrank.plan import Plan, select
from lrpet.lowrank.projector import LowRankProjector
from lrpet.lowrank.ranks import Choice, LayerReport, Report, resolve_ranks

__all__ = ["Compressor"]
UNITS = ("epoch", "iteration")
BITS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # bytes of a number → type of its bits


class Compressor:
    """Chooses ranks, projects on a schedule while you train, and factorizes at the end.

    Call :meth:`step` after each epoch, or with ``unit="iteration"`` after each step of the optimizer, and
    :meth:`finish` after training. Of a network in DistributedDataParallel give the wrapper, and call both in
    every process: the weights that the first one projected are sent to all.

    Args:
        model: any ``nn.Module``; it is projected in place.
        ranks: layer name → R, a list in module order, or a plan; this, ``prune_ratio`` or ``macs_reduction``.
        prune_ratio: ρ in [0, 1), the share of singular values to remove in each layer.
        macs_reduction: share of the multiply-adds to save, in (0, 1); needs ``example_inputs``.
        include, exclude: which layers take part, as for :func:`lrpet.select`; by default all convolutions.
        example_inputs: a tensor, a tuple or a dict to run the model on once, to count and to find BatchNorms.
        every: epochs or iterations from one projection to the next.
        unit: "epoch" or "iteration", for which each call of :meth:`step` stands.
        warmup: epochs or iterations before the first projection.
        gradual: epochs or iterations after ``warmup`` over which ranks fall to their values, as
            K − (K − R)·(1 − (1 − t)³), with t from 0 to 1; 0 to project to them from the first time on.
        multiple_of: what every rank shall be a multiple of, where a ratio or a reduction is given; 16 for
            speed on a CPU.
        energy_transfer, bn_rectification, keep_share, row_eps, batchnorms, unfolding: see
            :class:`LowRankProjector`.

    Raises:
        TypeError, ValueError: an argument is of another type, or out of range.

    Warns:
        UserWarning: the plan covers less than half of the model; see also :meth:`step` and :meth:`finish`.

    Source: arXiv 2204.05566; for the cubic schedule Zhu and Gupta, arXiv 1710.01878.

    >>> model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))
    >>> compressor = Compressor(model, example_inputs=torch.ones(1, 8, 6, 6), macs_reduction=0.5)
    >>> for epoch in range(3):
    ...     _ = compressor.step()  # after the training of an epoch
    >>> compressor.finish()[0]
    LowRankConv2d(
      (0): Conv2d(8, 6, kernel_size=(3, 3), stride=(1, 1), bias=False)
      (1): Conv2d(6, 16, kernel_size=(1, 1), stride=(1, 1))
    )
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Mapping[str, int] | Sequence[int] | None = None,
        *,
        prune_ratio: float | None = None,
        macs_reduction: float | None = None,
        include: Choice | None = None,
        exclude: Choice = (),
        example_inputs: Any = None,
        every: int = 1,
        unit: str = "epoch",
        warmup: int = 0,
        gradual: int = 0,
        multiple_of: int = 1,
        unfolding: str | Mapping[str, str] = "rows",
        energy_transfer: bool = True,
        bn_rectification: bool = True,
        keep_share: float = 0.0,
        row_eps: float = 1e-5,
        batchnorms: Mapping[str, str | None] | None = None,
    ):
        check("unit must be 'epoch' or 'iteration'", unit, isinstance(unit, str), lambda unit: unit in UNITS)
        schedule = {"every": every, "warmup": warmup, "gradual": gradual}
        for name, value in schedule.items():
            least = int(name == "every")
            wanted = f"{name} must be a whole number of {unit}s, {least} or more"
            check(wanted, value, is_whole(value), lambda value, least=least: value >= least)
        self.schedule = {"unit": unit} | {name: int(value) for name, value in schedule.items()}
        self.model = unwrap(model)
        choice = {"include": include, "exclude": exclude, "multiple_of": multiple_of, "unfolding": unfolding}
        self.plan = _plan(self.model, ranks, prune_ratio, macs_reduction, example_inputs, **choice)
        self.ranks = resolve_ranks(self.model, self.plan, unfolding)
        self.projector = LowRankProjector(
            self.model,
            self.ranks,
            energy_transfer,
            bn_rectification,
            keep_share=keep_share,
            row_eps=row_eps,
            batchnorms=batchnorms,
            example_inputs=example_inputs,
            unfolding=unfolding,
        )
        self.unfolding = {name: self.projector.unfolding[name] for name in self.ranks}
        self.settings = self.projector.settings | {"bn_rectification": bn_rectification}
        if (
            "columns" in self.unfolding.values()
        ):  # a state of rows alone is as it was before there was another
            self.settings["unfolding"] = self.unfolding
        self.steps = 0  # epochs or iterations so far
        self._report = Report()
        self._projected: dict[str, Any] | None = None  # when, to which ranks, and the weights it gave
        wrappers = (module for module in model.modules() if isinstance(module, DistributedDataParallel))
        self._processes = next((wrapper.process_group for wrapper in wrappers), None)

    @property
    def unit(self) -> str:
        """ "epoch" or "iteration": for which each call of :meth:`step` stands."""
        return self.schedule["unit"]

    def step(self) -> Report | None:
        """Count an epoch or iteration, and project if the schedule says so.

        Returns:
            The report of the projection, or None where there was none.

        Raises:
            ValueError: as :meth:`LowRankProjector.step`.

        Warns:
            UserWarning: the schedule had a projection, and no layer was projected; the report says why.
        """
        self.steps += 1
        if self.steps < self.schedule["warmup"] or self.steps % self.schedule["every"]:
            return None
        return self._project(self._ranks_now())

    def report(self) -> Report:
        """Return the report of the last projection; it is empty where there was none."""
        return self._report

    def finish(self) -> nn.Module:
        """Project one last time, unless the weights are as the last projection left them, and factorize.

        Returns:
            A new, smaller network with the same outputs, see :func:`lrpet.factorize`.

        Raises:
            ValueError: as :meth:`LowRankProjector.step` and :func:`lrpet.factorize`.

        Warns:
            UserWarning: nothing was projected before, or training went on after the last projection. The
                network was then not trained to have these ranks, and its accuracy may be lower.
        """
        last, now = self._projected, {"ranks": self.ranks, "weights": _fingerprint(self.model, self.ranks)}
        what = None
        if last is None:
            what = f"nothing was projected in {self.steps} {self.unit}s"
        elif last["ranks"] != now["ranks"]:
            what = f"the ranks had not come down to those of the plan after {self.steps} {self.unit}s"
        elif last["weights"] != now["weights"]:
            what = f"the weights have changed since the last projection, after {last['steps']} {self.unit}s"
        if what:
            warnings.warn(
                f"{what}: finish() projects now, and nothing is trained after that; measure the accuracy of "
                "the compact network, or choose every, warmup and gradual so that training ends with a "
                "projection",
                stacklevel=2,
            )
            self._project(self.ranks)
        return factorize(self.model, self.ranks, unfolding=self.unfolding)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs beside the model: numbers, texts, tensors, lists and dicts.

        >>> model = nn.Sequential(nn.Conv2d(8, 16, 3))
        >>> Compressor(model, [2]).state_dict()["ranks"]
        {'0': 2}
        """
        return {
            "steps": self.steps,
            "ranks": dict(self.ranks),
            "schedule": dict(self.schedule),
            "settings": dict(self.settings),
            "projected": self._projected,
            "projector": self.projector.state_dict(),
            "report": [dataclasses.astuple(layer) for layer in self._report],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume: with model and optimizer loaded too, all that follows is the same bit for bit.

        Args:
            state: of :meth:`state_dict`, of a compressor with the same layers, schedule and settings. Its
                ranks are taken, which may have been chosen by other weights.

        Raises:
            ValueError: the state is of something else; it names what differs, and nothing is changed.
        """
        if not isinstance(state, Mapping) or self.state_dict().keys() != state.keys():
            raise ValueError(f"state must be what state_dict() of a Compressor returned; got {state!r:.80}")
        for kind in ("schedule", "settings"):
            theirs, ours = state[kind], getattr(self, kind)
            for name in {**ours, **theirs}:
                if theirs.get(name) != ours.get(name):
                    raise ValueError(
                        f"the state has {name}={theirs.get(name)!r}, and this compressor "
                        f"{name}={ours.get(name)!r}; make it as the one was made that is resumed"
                    )
        if state["ranks"].keys() != self.ranks.keys():
            other = sorted(state["ranks"].keys() ^ self.ranks.keys())[0]
            raise ValueError(
                f"the state and this compressor differ in layer {other!r}; choose the same layers"
            )
        self.ranks = resolve_ranks(self.model, state["ranks"], self.unfolding)
        self.plan, self.steps = self.plan.with_ranks(self.ranks), state["steps"]
        self._projected = state["projected"]
        self.projector.set_ranks(self._projected["ranks"] if self._projected else self.ranks)
        self.projector.load_state_dict(state["projector"])
        self._report = Report(LayerReport(*layer) for layer in state["report"])

    def _ranks_now(self) -> dict[str, int]:
        gradual = self.schedule["gradual"]
        t = min(1.0, (self.steps - self.schedule["warmup"]) / gradual) if gradual else 1.0
        ranks = {}
        for layer in self.plan.layers:
            if layer.taken:
                K, R = min(layer.N, layer.D), self.ranks[layer.name]
                ranks[layer.name] = K - math.floor((K - R) * (1 - (1 - t) ** 3))
        return ranks

    def _project(self, ranks: dict[str, int]) -> Report:
        self.projector.set_ranks(ranks)
        self._report = self.projector.step()
        if self._processes is not None:
            for name in ranks:
                _copy_from_first(self.model.get_submodule(name).weight.detach(), self._processes)
        if not any(layer.action == "projected" for layer in self._report):
            reasons = {layer.reason for layer in self._report if layer.action == "left alone"}
            warnings.warn(f"no layer was projected: {'; '.join(sorted(reasons))}", stacklevel=3)
        weights = _fingerprint(self.model, ranks)
        self._projected = {"steps": self.steps, "ranks": ranks, "weights": weights}
        return self._report


def _plan(
    model: nn.Module,
    ranks,
    prune_ratio,
    macs_reduction,
    example_inputs,
    *,
    include,
    exclude,
    multiple_of,
    unfolding,
) -> Plan:
    """Return the plan with ranks that the arguments of a compressor stand for."""
    same = {"example_inputs": example_inputs, "unfolding": unfolding}
    ways = {"ranks": ranks, "prune_ratio": prune_ratio, "macs_reduction": macs_reduction}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give one of {', '.join(ways)}; got {' and '.join(given) or 'none'}")
    if macs_reduction is not None and example_inputs is None:
        raise ValueError("macs_reduction needs example_inputs=, on which the multiply-adds are counted")
    if ranks is not None:
        if include is not None or exclude or multiple_of != 1:
            raise ValueError(
                "ranks names the layers; give it, or include, exclude and multiple_of with a ratio"
            )
        stated = resolve_ranks(model, ranks, unfolding)
        plan = ranks if isinstance(ranks, Plan) else select(model, [*stated], **same)
        left = [layer for layer in plan.layers if layer.name in stated and not layer.taken]
        if left:
            raise ValueError(f"ranks names layer {left[0].name!r}, which cannot take part: {left[0].reason}")
        return plan.with_ranks(stated)
    plan = select(model, include, exclude, prune_ratio=prune_ratio, multiple_of=multiple_of, **same)
    if not plan:
        raise ValueError("no layer takes part; print(lrpet.select(model, '*')) shows all layers and reasons")
    if macs_reduction is None:
        return plan
    budget = {"macs_reduction": macs_reduction, "multiple_of": multiple_of}
    return ranks_for_budget(model, include=plan, **budget, **same)


def _fingerprint(model: nn.Module, names) -> list[int]:
    """Return the sum of the bits of each weight as integers: training changes it."""
    weights = [model.get_submodule(name).weight.detach() for name in names]
    return [int(weight.contiguous().view(BITS[weight.element_size()]).sum()) for weight in weights]


def _copy_from_first(weight: Tensor, processes) -> None:
    values = weight.contiguous()
    dist.broadcast(values, dist.get_global_rank(processes, 0), group=processes)
    if values is not weight:
        weight.copy_(values)
