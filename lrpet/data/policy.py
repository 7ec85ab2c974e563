"""AutoAugment of a whole batch, drawn anew for each image as a loader of single images does."""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import torch
from torch import Tensor
from torchvision.transforms import v2

__all__ = ["BatchPolicy"]
BINS = 10  # magnitudes that the policy counts in
GREY = 128  # of what comes in from outside of the image


class BatchPolicy(v2.AutoAugment):
    """The policy for CIFAR-10 by torchvision's tables and operations; images of one operation go together.

    torchvision draws once a call, so it would change all images of a batch alike, and a call for each image
    takes several times as long as this.

    Source: Cubuk et al., "AutoAugment", arXiv 1805.09501, table 7.

    >>> images = torch.full((4, 8, 8, 3), 200, dtype=torch.uint8)
    >>> BatchPolicy().vary(images, torch.rand(4, BatchPolicy.draws)).shape
    torch.Size([4, 8, 8, 3])
    """

    draws = 5  # random numbers for an image

    def __init__(self):
        super().__init__(v2.AutoAugmentPolicy.CIFAR10, fill=GREY)

    def vary(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return the images changed.

        Args:
            images: (B, H, W, 3) uint8, on any device.
            draws: (B, 5), uniform in [0, 1), on the CPU: which pair of operations; for each of the two
                whether; for each its sign.
        """
        images = images.permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W)
        chosen = (draws[:, 0] * len(self._policies)).long().tolist()
        for place in (0, 1):  # in the pair
            alike = defaultdict(list)  # operation and its size → images
            whether, sign = draws[:, [1 + place, 3 + place]].T.tolist()
            for i, pair in enumerate(chosen):
                name, share, magnitude = self._policies[pair][place]
                if whether[i] < share:
                    alike[name, _size(name, magnitude, images.shape[-2:], sign[i] < 0.5)].append(i)
            # one transfer for all of them, because it waits for the device
            order = torch.tensor(sum(alike.values(), []), dtype=torch.long, device=images.device)
            groups = order.split([len(which) for which in alike.values()]) if alike else ()
            for (name, size), which in zip(alike, groups, strict=True):
                images[which] = self._apply_image_or_video_transform(
                    images[which], name, size, interpolation=self.interpolation, fill=self._fill
                )
        return images.permute(0, 2, 3, 1).contiguous()


@cache  # each answer takes a table of tensors
def _size(name: str, magnitude: int | None, shape: tuple[int, int], mirrored: bool) -> float:
    """Return how far an operation goes, in its own unit; 0 where it has no size."""
    values, signed = v2.AutoAugment._AUGMENTATION_SPACE[name]
    table = values(BINS, *shape)
    size = 0.0 if table is None else float(table[magnitude])
    return -size if signed and mirrored else size
