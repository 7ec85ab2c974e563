"""The state of a run in training: what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path

import torch

from lrpet.config import RunConfig
from lrpet.data.batches import Batches
from lrpet.methods.base import Dense
from lrpet.processes import ALONE, Processes
from lrpet.registry import BLOCKS
from lrpet.training.best import BestEpoch
from lrpet.training.checkpoint import load_checkpoint, save_checkpoint
from lrpet.training.clock import Clock
from lrpet.training.recipes import make_optimizer
from lrpet.training.recording import Recorder

__all__ = ["State"]
PLAIN = ("step", "history", "layers", "projections", "projected")  # go into a checkpoint as they are


class State:
    """Everything that training changes, and that it needs to resume at the bit where it stopped.

    Args:
        config: the run.
        method: owner of the network, on the device of ``batches``.
        batches: the data.
        processes: that train together. The checkpoint is the first's; it is that of one process, with the
            sums of all.

    Attributes:
        step: optimizer steps made.
        history: one row per finished epoch.
        layers: report of the last projection.
        projections: how many were made; ``projected``: whether the last step had one.
        totals: (3,), float64, of the epoch: losses, correct answers, images; of several processes, this one's
            part.
        recorder, clock: what was recorded, and the seconds spent.
        best: the best of the last epochs, where the run asks for it.
    """

    def __init__(self, config: RunConfig, method: Dense, batches: Batches, processes: Processes = ALONE):
        self.config, self.method, self.processes, self.device = config, method, processes, batches.device
        self.step, self.projections, self.projected = 0, 0, False
        self.history: list[dict] = []
        self.layers: list[dict] = []
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        recorded, how = BLOCKS.get(config.model), config.unfolding or "rows"
        self.recorder, self.clock = Recorder(config.epochs, batches.steps, recorded, how), Clock()
        self.best = BestEpoch(config)
        self.new_optimizer()

    def new_optimizer(self) -> None:
        """Make the optimizer of the network that the method has now."""
        method = self.method
        groups = method.undecayed, method.alone
        self.optimizer = make_optimizer(self.config, method.model, self.device, *groups)

    def load(self, path: Path) -> None:
        """Take over the newest whole checkpoint, where there is one; see :func:`load_checkpoint`."""
        kept = load_checkpoint(path, self.device, self.processes)
        if kept is None:
            return
        for name in PLAIN:
            setattr(self, name, kept[name])
        self.method.restore(kept["structure"])
        self.method.model.load_state_dict(kept["model"])
        self.new_optimizer()
        self.optimizer.load_state_dict(kept["optimizer"])
        self.recorder.state = kept["records"]
        self.clock.seconds.update(kept["seconds"])
        self.totals.copy_(torch.tensor(kept["sums"], dtype=torch.float64) * self.processes.first)
        self.best.state = kept.get("best", self.best.state)  # checkpoints from before have none

    def save(self, path: Path) -> None:
        """Write the checkpoint; all processes call this, the first writes."""
        sums = self.processes.sum(self.totals).tolist()
        if self.processes.first:
            kept = {name: getattr(self, name) for name in PLAIN} | {
                "structure": self.method.structure,
                "model": self.method.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "records": self.recorder.state,
                "seconds": dict(self.clock.seconds),
                "sums": sums,
                "best": self.best.state,
            }
            save_checkpoint(path, kept)
