"""Finding objects: the losses of torchvision's detectors, and mAP as pycocotools counts it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrpet.config import RunConfig
from lrpet.data.objects import ObjectBatches
from lrpet.processes import ALONE, Processes
from lrpet.training.tasks import Task

__all__ = ["Detection", "targets_of"]


class Detection(Task):
    """Boxes with labels and scores; see :func:`lrpet.training.tasks.task_of`.

    Source: Ren et al., arXiv 1506.01497, for the losses of Faster R-CNN.
    """

    graphs = False  # how many boxes there are differs from batch to batch

    def forward(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """Return the parts of the loss, (parts,): means over the images."""
        return torch.stack(list(model(list(x), targets_of(target)).values()))

    def loss(self, config: RunConfig, output: Tensor, target: Tensor) -> Tensor:
        """Return their sum."""
        return output.sum()

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, batches: ObjectBatches, processes: Processes = ALONE
    ) -> dict[str, float]:
        """Return ``loss``, ``map_pct`` at an IoU of 0.5, as VOC's, and ``coco_map_pct``, over 0.5 to 0.95.

        Objects marked as crowd or difficult are neither asked for nor counted as wrong. The loss is that of
        training, with BatchNorm as in evaluation.

        Source: pycocotools' rules through torchmetrics.
        """
        was_training, loss, images = model.training, 0.0, 0
        found = []
        with torch.random.fork_rng(devices=[batches.device] if batches.device.type == "cuda" else []):
            torch.manual_seed(0)  # a loss looks at boxes drawn at random
            for x, y in batches.test():
                model.eval()
                boxes = model(list(x))
                for name in ("", "rpn", "roi_heads"):  # ask for losses; BatchNorms stay as they are
                    if not name or hasattr(model, name):
                        model.get_submodule(name).training = True
                loss += len(x) * float(self.forward(model, x, y).sum())
                images += len(x)
                found += [
                    ({name: values.cpu() for name, values in one.items()}, target)
                    for one, target in zip(boxes, targets_of(y.cpu(), crowd=True), strict=True)
                ]
        model.train(was_training)
        sums = processes.sum(torch.tensor([loss, images], dtype=torch.float64)).tolist()
        everything = [pair for part in processes.gather(found) for pair in part]
        return {"loss": sums[0] / max(sums[1], 1)} | _mean_precision(everything)


def targets_of(y: Tensor, *, crowd: bool = False) -> list[dict[str, Tensor]]:
    """Return the targets of a batch (B, n, 6) as torchvision's detectors take them, with or without crowds.

    >>> targets_of(torch.tensor([[[3, 0, 0, 8, 8, 0], [0, 0, 0, 0, 0, 0]]]))[0]["labels"]
    tensor([3])
    """
    targets = []
    for rows in y:
        rows = rows[(rows[:, 0] > 0) & (crowd | (rows[:, 5] == 0))]
        targets.append({"boxes": rows[:, 1:5], "labels": rows[:, 0].long(), "iscrowd": rows[:, 5].long()})
    return targets


def _mean_precision(found: list[tuple[dict, dict]]) -> dict[str, float]:
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(sync_on_compute=False)  # every process has all
    metric.warn_on_many_detections = False
    metric.update(*map(list, zip(*found, strict=True)))
    scores = metric.compute()
    # -1 where nothing was to be found
    return {
        name: 100 * max(0.0, float(scores[key]))
        for name, key in (("map_pct", "map_50"), ("coco_map_pct", "map"))
    }
