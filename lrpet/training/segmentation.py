"""A class for each pixel: cross-entropy, and the mean intersection over union."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrpet.config import RunConfig
from lrpet.data.objects import IGNORED, ObjectBatches
from lrpet.processes import ALONE, Processes
from lrpet.training.tasks import Task

__all__ = ["Segmentation"]


class Segmentation(Task):
    """Logits (B, classes, H, W) against labels (B, H, W); see :func:`lrpet.training.tasks.task_of`."""

    def loss(self, config: RunConfig, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy of the pixels that count; 0 where there is none."""
        pixels = (target != IGNORED).sum().clamp(min=1)  # no wait for a GPU, as max() would make one
        return F.cross_entropy(output, target, ignore_index=IGNORED, reduction="sum") / pixels

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, batches: ObjectBatches, processes: Processes = ALONE
    ) -> dict[str, float]:
        """Return ``loss`` and ``miou_pct``, the mean over classes of intersection over union of all pixels.

        The ground is one of the classes; one that is neither there nor found does not count.

        Source: torchmetrics' Jaccard index, which is VOC's measure.
        """
        from torchmetrics.classification import MulticlassJaccardIndex

        classes, was_training = len(batches.data.classes), model.training
        metric = MulticlassJaccardIndex(classes, ignore_index=IGNORED, sync_on_compute=False)
        metric, sums = metric.to(batches.device), torch.zeros(2, dtype=torch.float64, device=batches.device)
        model.eval()
        for x, y in batches.test():
            logits = model(x)
            metric.update(logits.argmax(1), y)
            sums[0] += F.cross_entropy(logits, y, ignore_index=IGNORED, reduction="sum")
            sums[1] += (y != IGNORED).sum()
        model.train(was_training)
        metric.confmat = processes.sum(metric.confmat)
        loss, pixels = processes.sum(sums).tolist()
        return {"loss": loss / max(pixels, 1), "miou_pct": 100 * float(metric.compute())}
