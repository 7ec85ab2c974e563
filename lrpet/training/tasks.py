"""What a task is trained and scored by; its metric, data sets and networks are a row of the registry."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lrpet.config import RunConfig
from lrpet.data.batches import Batches
from lrpet.data.sets import ImageData
from lrpet.processes import ALONE, Processes
from lrpet.registry import TASKS
from lrpet.training.evaluate import evaluate
from lrpet.training.recipes import make_mixer, training_loss

__all__ = ["Classification", "Task", "task_of"]


class Task:
    """What training asks of a task; each adds ``loss`` and ``evaluate``, as :class:`Classification` has them.

    >>> Task().training_scores(loss_sum=2.0, correct=0.0, seen=4.0)
    {'train_loss': 0.5}
    """

    graphs = True  # a step can be recorded on a GPU: every batch makes the same kernels run

    def mixer(self, config: RunConfig, data: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return what mixes a batch before a step, (x, y) to (x, target): here nothing."""
        return lambda x, y: (x, y)

    def forward(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """Return what the network gives for a batch in training."""
        return model(x)

    def correct(self, output: Tensor, y: Tensor) -> Tensor:
        """Return how many of a batch are right, a scalar; 0 where training counts none."""
        return output.new_zeros(())

    def training_scores(self, loss_sum: float, correct: float, seen: float) -> dict[str, float]:
        """Return ``train_loss`` and, if known, ``train_`` with the metric, from the sums of an epoch."""
        return {"train_loss": loss_sum / max(seen, 1)}


class Classification(Task):
    """One label for each image.

    >>> Classification().training_scores(loss_sum=2.0, correct=3.0, seen=4.0)
    {'train_loss': 0.5, 'train_top1_pct': 75.0}
    """

    def mixer(self, config: RunConfig, data: ImageData) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return mixup and cutmix where the recipe has them."""
        return make_mixer(config, len(data.classes), data.mean)

    def loss(self, config: RunConfig, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of what the network gives for a batch, a scalar."""
        return training_loss(config, output, target)

    def correct(self, output: Tensor, y: Tensor) -> Tensor:
        """Return how many of a batch are right, a scalar."""
        return (output.argmax(1) == y).sum()

    def training_scores(self, loss_sum: float, correct: float, seen: float) -> dict[str, float]:
        """Return ``train_loss`` and ``train_top1_pct`` from the sums of an epoch."""
        scores = super().training_scores(loss_sum, correct, seen)
        return scores | {"train_top1_pct": 100 * correct / max(seen, 1)}

    def evaluate(self, model: nn.Module, batches: Batches, processes: Processes = ALONE) -> dict[str, float]:
        """Return ``loss`` and the metric, by its column, on the held-out part."""
        return evaluate(model, batches, processes)


def task_of(config: RunConfig) -> Task:
    """Return what a run is trained and scored by; its module is loaded only now.

    >>> type(task_of(RunConfig())).__name__
    'Classification'
    """
    module, _, name = TASKS[config.task].code.partition(":")
    return getattr(importlib.import_module(module), name)()
