"""An annotated image as a network is shown it: varied by torchvision, with its boxes or mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from lrpet.data.objects import IGNORED, Annotated, ObjectData

__all__ = ["Variations"]
# edges of training images, relative to the largest that fits the square
JITTER = {"detection": (0.5, 1.25), "segmentation": (0.5, 2.0), "scenes": (0.75, 1.25)}
SMALLEST = 2.0  # pixels of an edge that a crop leaves of a box; of less the box is dropped


class _Square(v2.Transform):
    """Fills up to a square, to the right and below."""

    def __init__(self, size: int, fill: dict):
        super().__init__()
        self.size, self.fill = size, fill

    def transform(self, inpt: Any, params: dict) -> Any:
        height, width = v2.functional.get_size(inpt)
        gap = [0, 0, self.size - width, self.size - height]
        return v2.functional.pad(inpt, gap, fill=self.fill.get(type(inpt), 0))


def _with_boxes(sample: dict) -> tuple[Tensor, Tensor]:
    return sample["labels"], sample["crowd"]


class Variations:
    """Turns annotated images of any size into squares with targets, at random for training.

    Colours are distorted, images mirrored, resized and cropped; held-out images are resized to fit the square
    and filled up. What is filled in has the mean colour and, in a mask, the class that is ignored.

    Args:
        data: task, image size, mean colour, ``flip`` and ``jitter`` are read.
        training: vary at random.

    Source: torchvision.transforms.v2; ranges as in torchvision's references for detection and segmentation.
    """

    def __init__(self, data: ObjectData, *, training: bool):
        self.task, size = data.task, data.image_size
        fill = {tv_tensors.Image: [round(255 * m) for m in data.mean], tv_tensors.Mask: IGNORED}
        if training:
            steps = [
                v2.RandomPhotometricDistort(),
                v2.RandomHorizontalFlip(0.5 if data.flip else 0.0),
                v2.ScaleJitter((size, size), JITTER[data.jitter]),
                v2.RandomCrop(size, pad_if_needed=True, fill=fill),
            ]
        else:
            steps = [v2.Resize(size=None, max_size=size), _Square(size, fill)]
        if data.task == "detection":
            steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(SMALLEST, labels_getter=_with_boxes)]
        self.steps = v2.Compose(steps)

    def __call__(self, given: Annotated, seed: int) -> tuple[Tensor, Tensor]:
        """Return an image (3, S, S) uint8 and its target.

        Args:
            given: image, boxes and mask.
            seed: of all that is drawn; PyTorch's own generator is left as it was.

        Returns:
            The target of a detector is (n, 6) float32: label from 1, x1, y1, x2, y2, crowd; of a segmenter
            (S, S) int64.
        """
        sample = {"image": tv_tensors.Image(given.image)}
        if self.task == "detection":
            boxes = tv_tensors.BoundingBoxes(given.boxes, format="XYXY", canvas_size=given.image.shape[1:])
            sample |= {"boxes": boxes, "labels": given.labels, "crowd": given.crowd}
        else:
            sample["mask"] = tv_tensors.Mask(given.mask)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            sample = self.steps(sample)
        image = sample["image"].as_subclass(Tensor)
        if self.task == "segmentation":
            return image, sample["mask"].as_subclass(Tensor)
        columns = 1 + sample["labels"][:, None], sample["boxes"].as_subclass(Tensor), sample["crowd"][:, None]
        return image, torch.cat([column.float() for column in columns], 1)
