"""The network that the LRPET authors score: the best of the last epochs, each taken before its projection."""

from __future__ import annotations

from lrpet.config import RunConfig
from lrpet.data.batches import Batches
from lrpet.lowrank.factorize import factorize
from lrpet.lowrank.layers import copy_of
from lrpet.methods.base import Method
from lrpet.processes import ALONE, Processes
from lrpet.training.tasks import task_of

__all__ = ["BestEpoch"]


class BestEpoch:
    """Keeps the weights of the best of a run's last epochs, where ``best_of_last`` asks for it.

    An epoch is scored before the projection that ends it, which takes an evaluation more in those epochs
    alone. A method that does not project is scored after each epoch anyway, and nothing is kept of it.

    Args:
        config: of the run.

    Attributes:
        state: of plain values and tensors, for a checkpoint: the metric of each epoch so scored, in order,
            under its column; of the best of them ``epoch`` (from 1), ``ranks`` and ``weights``.

    Source: the code of arXiv 2204.05566.

    >>> best = BestEpoch(RunConfig(best_of_last=3))  # of 20 epochs
    >>> [best.counts(epoch) for epoch in (16, 17, 19)]
    [False, True, True]
    """

    def __init__(self, config: RunConfig):
        projects = config.projection_interval is not None
        self.first = config.epochs - (config.best_of_last or 0) if projects else config.epochs
        self.metric, self.task = config.metric, task_of(config)
        self.state: dict = {self.metric.column: []}

    @property
    def scores(self) -> list[float]:
        """The metric of each epoch that was scored before its projection, in order."""
        return self.state[self.metric.column]

    @property
    def best_score(self) -> float | None:
        """The best of them; None before there is one."""
        return max(self.scores, key=lambda score: self.metric.sign * score, default=None)

    def counts(self, epoch: int) -> bool:
        """Tell whether an epoch (from 0) is one of those."""
        return epoch >= self.first

    def consider(self, epoch: int, method: Method, batches: Batches, processes: Processes = ALONE) -> None:
        """Score the network that an epoch (from 0) ends with, and keep its weights if it is the best yet."""
        # running statistics of the first: each process has those of its own part of the last batch
        processes.copy_from(0, list(method.model.buffers()))
        score, best = (
            self.task.evaluate(method.model, batches, processes)[self.metric.column],
            self.best_score,
        )
        if best is None or self.metric.sign * (score - best) > 0:  # the first of several
            weights = {name: tensor.clone() for name, tensor in method.model.state_dict().items()}
            self.state |= {"epoch": epoch + 1, "ranks": dict(method.ranks), "weights": weights}
        self.scores.append(score)

    def summary(
        self, config: RunConfig, method: Method, history: list[dict], batches: Batches, processes: Processes
    ) -> dict:
        """Return the score of a finished run by this rule; empty where it was not asked for.

        Returns:
            ``best_of_last_epoch`` (from 1) and, each with the metric's column, ``best_of_last_uncut_…`` as it
            was scored, and ``best_of_last_…`` of that network cut by an SVD, without energy transfer and BN
            rectification; of a method that does not project the two are one.
        """
        if config.best_of_last is None:
            return {}
        column = self.metric.column
        if not self.scores:
            row = max(history[-config.best_of_last :], key=lambda row: self.metric.sign * row[column])
            epoch, uncut, cut = row["epoch"], row[column], row[column]
        else:
            network = copy_of(method.model)
            network.load_state_dict(self.state["weights"])
            epoch, uncut = self.state["epoch"], self.best_score
            compact = factorize(network, self.state["ranks"], unfolding=config.unfolding or "rows")
            cut = self.task.evaluate(compact, batches, processes)[column]
        names = ("best_of_last_epoch", f"best_of_last_uncut_{column}", f"best_of_last_{column}")
        return dict(zip(names, (epoch, uncut, cut), strict=True))
