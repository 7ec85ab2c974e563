"""A language model of bytes: cross-entropy of the next byte, scored in bits per byte."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrpet.config import RunConfig
from lrpet.data.text import TextBatches
from lrpet.processes import ALONE, Processes
from lrpet.training.tasks import Task

__all__ = ["Language"]


class Language(Task):
    """The next byte: logits (B, T, 256) against bytes (B, T); see :func:`lrpet.training.tasks.task_of`.

    >>> Language().training_scores(loss_sum=2 * math.log(2), correct=0.0, seen=1.0)["train_bits_per_byte"]
    2.0
    """

    def loss(self, config: RunConfig, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy of logits (B, T, 256) and bytes (B, T), in nats."""
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    def training_scores(self, loss_sum: float, correct: float, seen: float) -> dict[str, float]:
        """Return ``train_loss``, in nats, and ``train_bits_per_byte`` from the sums of an epoch."""
        scores = super().training_scores(loss_sum, correct, seen)
        return scores | {"train_bits_per_byte": scores["train_loss"] / math.log(2)}

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, batches: TextBatches, processes: Processes = ALONE
    ) -> dict[str, float]:
        """Return ``loss`` in nats and ``bits_per_byte``, means over the bytes of the held-out windows.

        The first bytes of a window are said from few before them, as of any other run.

        Args:
            model: on the device of ``batches``; its mode is restored afterwards.
            batches: the text, or of several processes each one's part of it.
            processes: that evaluate it together.
        """
        was_training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=batches.device)  # nats, bytes
        for x, y in batches.test():
            sums[0] += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
            sums[1] += y.numel()
        model.train(was_training)
        nats, count = processes.sum(sums).tolist()
        return {"loss": nats / count, "bits_per_byte": nats / count / math.log(2)}
