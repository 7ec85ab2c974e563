"""Loss and accuracy on the held-out images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lrpet.data.batches import Batches
from lrpet.processes import ALONE, Processes

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, processes: Processes = ALONE) -> dict[str, float]:
    """Return ``loss``, ``top1_pct`` and, of more than five classes, ``top5_pct`` on the held-out images.

    ``loss`` is the mean cross-entropy; all is computed in float32.

    Args:
        model: on the device of ``batches``; its mode is restored afterwards.
        batches: the data set, or of several processes each one's part of it.
        processes: that evaluate it together.
    """
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=batches.device)
    correct = torch.zeros(2, dtype=torch.int64, device=batches.device)  # first guess, one of the first five
    for x, y in batches.test():
        logits = model(x)
        loss += F.cross_entropy(logits, y, reduction="sum")
        five = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]  # (B, 5)
        correct += torch.stack([(logits.argmax(1) == y).sum(), five.sum()])
    model.train(was_training)
    n = len(batches.data.test_labels)
    loss, first, five = processes.sum(torch.cat([loss[None], correct.double()])).tolist()
    scores = {"loss": loss / n, "top1_pct": 100 * first / n}
    return scores | {"top5_pct": 100 * five / n} if len(batches.data.classes) > 5 else scores
