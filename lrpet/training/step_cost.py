"""What a step of a finished run costs: bytes of optimizer state and gradients, peak memory, seconds.

Measured after the run on a copy of its network with an optimizer of its own, so that no checkpoint keeps
anything of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lrpet.config import RunConfig
from lrpet.data.batches import Batches
from lrpet.data.text import TextBatches
from lrpet.lowrank.gradient_projection import GradientProjection
from lrpet.lowrank.layers import copy_of
from lrpet.lowrank.ranks import compressible_layers
from lrpet.registry import BLOCKS
from lrpet.training.recipes import make_optimizer
from lrpet.training.step import Step
from lrpet.training.tasks import task_of

__all__ = ["state_bytes", "step_cost"]
PLAIN, REFRESHES = 7, 3  # updates that are timed


def state_bytes(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor] | None = None) -> int:
    """Return the bytes of an optimizer's state over all storages, of some parameters or of all.

    >>> weight = nn.Parameter(torch.ones(2, 3))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    >>> weight.grad = torch.ones(2, 3)
    >>> optimizer.step()
    >>> state_bytes(optimizer)
    24
    """
    chosen = optimizer.state if parameters is None else parameters
    states = [optimizer.state[p].values() for p in chosen if p in optimizer.state]
    storages = [value.untyped_storage() for state in states for value in state if isinstance(value, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def step_cost(
    config: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches | TextBatches
) -> dict[str, int | float | None]:
    """Return what the optimizer of a run holds, and what a step of it costs.

    Args:
        config: of the run; where it names no block matrices, those are 0 bytes.
        model: its network at full size, on the device of ``batches``; not changed.
        optimizer: as the run left it.
        batches: of which one batch is used.

    Returns:
        ``steps`` of the run; ``optimizer_state_bytes``, and ``block_state_bytes`` of the block matrices
        alone; ``gradient_bytes`` of all, and ``largest_gradient_bytes`` of one parameter, which is what lives
        at a time with per-layer updates; ``peak_bytes`` of a step: parameters, gradients, state, activations
        and temporaries, on a CPU without the work space of LAPACK; ``update_seconds`` of the optimizer's
        step, and ``step_seconds`` of all of it, medians. On a CPU these are CPU seconds of this process, so
        that other programs do not count. With gradient projection ``refresh_peak_bytes`` and
        ``refresh_update_seconds`` of steps at which every layer has a new basis, and ``refreshes``, the mean
        number of bases of a layer in the run; None without.
    """
    names = compressible_layers(model, BLOCKS[config.model]) if config.model in BLOCKS else {}
    held = {
        "optimizer_state_bytes": state_bytes(optimizer),
        "steps": config.epochs * batches.steps,
        "block_state_bytes": state_bytes(optimizer, [model.get_submodule(name).weight for name in names]),
    }
    probe = _Probe(config, model, batches)
    for _ in range(2):
        probe.step()  # makes the state
    gradients = [p.grad.nbytes for p in probe.model.parameters() if p.grad is not None]
    plain = [probe.step() for _ in range(PLAIN)]
    measured = held | {
        "gradient_bytes": sum(gradients),
        "largest_gradient_bytes": max(gradients),
        "peak_bytes": probe.peak(),
        "update_seconds": statistics.median(update for update, _ in plain),
        "step_seconds": statistics.median(whole for _, whole in plain),
    }
    if not isinstance(optimizer, GradientProjection):
        return measured | dict.fromkeys(("refresh_peak_bytes", "refresh_update_seconds", "refreshes"))
    refreshes = [row["refreshes"] for row in optimizer.report()]
    return measured | {
        "refresh_peak_bytes": probe.peak(refresh=True),
        "refresh_update_seconds": statistics.median(probe.step(refresh=True)[0] for _ in range(REFRESHES)),
        "refreshes": statistics.mean(refreshes),
    }


class _Probe:
    """Makes steps with a copy of a network."""

    def __init__(self, config: RunConfig, model: nn.Module, batches: Batches | TextBatches):
        self.model, self.device = copy_of(model).train(), batches.device
        self.optimizer = make_optimizer(config, self.model, self.device)
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.work = Step(config, self.model, self.optimizer, totals)
        x, self.y = next(batches.epoch(0))
        self.x, self.target = task_of(config).mixer(config, batches.data)(x, self.y)

    def _seconds(self, work: Callable, *given: Tensor) -> float:
        clock = time.process_time
        if self.device.type == "cuda":
            clock = time.perf_counter
            torch.cuda.synchronize(self.device)
        began = clock()
        work(*given)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return clock() - began

    def step(self, *, refresh: bool = False) -> tuple[float, float]:
        """Make a step; return the seconds of the optimizer's part, and of all."""
        if refresh:
            self.optimizer.refresh_next()
        first = self._seconds(self.work.backward, self.x, self.target, self.y)
        update = self._seconds(self.work.update)
        return update, first + update

    def peak(self, *, refresh: bool = False) -> int:
        """Make a step; return the bytes at its peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step(refresh=refresh)
            return torch.cuda.max_memory_allocated(self.device)
        from torch.distributed._tools.mem_tracker import MemTracker  # 1 s to import

        tracker = MemTracker()
        tracker.track_external(self.model, self.optimizer)
        with tracker:
            self.step(refresh=refresh)
        return tracker.get_tracker_snapshot("peak")[self.device]["Total"]
