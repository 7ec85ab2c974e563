"""Images as uint8 on the device, augmented there in whole batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lrpet.data.sets import ImageData

__all__ = ["Batches"]


class Batches:
    """Serves normalized, augmented batches of a data set that lives on the device.

    The order of an epoch and all that changes its images at random are drawn at its start on the CPU from
    (seed, epoch) alone: the same on every device, and an epoch can be entered at any step. Where several
    processes train together each is served its part of the same batches, so an epoch can also be entered by
    another number of them.

    Args:
        data: the images.
        batch_size: images per batch; the last batch of an epoch may be smaller, as in the usual loaders.
        device: where batches are made and served.
        seed: of the run.
        rank, world: which process this is, of how many; it serves every ``world``-th image of a batch,
            possibly none of the last one.
        passes: over the images in an epoch, in an order each, without a break between them; of several the
            last batch is left out unless it is full or the only one.
        autoaugment: change each image by the policy for CIFAR-10, after its crop; before, where crops are
            resized.

    >>> from lrpet.data import load_data
    >>> from lrpet.config import RunConfig
    >>> x, y = next(Batches(load_data(RunConfig()), 64, "cpu", seed=1).epoch(0))
    >>> x.shape, y.shape
    (torch.Size([64, 3, 8, 8]), torch.Size([64]))
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        device: str | torch.device,
        seed: int,
        rank: int = 0,
        world: int = 1,
        passes: int = 1,
        autoaugment: bool = False,
    ):
        self.data, self.batch_size, self.device = data, batch_size, torch.device(device)
        self.seed, self.rank, self.world = seed, rank, world
        self.labels = data.train_labels.to(self.device)
        self.scale = torch.tensor([1 / (255 * s) for s in data.std], device=self.device)
        self.shift = torch.tensor(
            [m / s for m, s in zip(data.mean, data.std, strict=True)], device=self.device
        )
        self.served = passes * len(self.labels)  # images in an epoch
        if passes > 1 and self.served > batch_size:
            self.served -= self.served % batch_size
        self.steps = -(-self.served // batch_size)
        self.policy = None
        if autoaugment:
            from lrpet.data.policy import BatchPolicy  # torchvision takes 2 s to import

            self.policy = BatchPolicy()
        self._place()

    def _place(self) -> None:
        """Put the images where batches are made of them."""
        self.test_images = self.data.test_images.to(self.device)
        self.test_labels = self.data.test_labels.to(self.device)
        self.images, pad = self.data.train_images.to(self.device), self.data.pad
        if pad:
            self.images = F.pad(self.images, (0, 0, pad, pad, pad, pad))  # zeros, in height and width

    def _normalize(self, pixels: Tensor) -> Tensor:
        """Turn (B, H, W, 3) uint8 or float into (B, 3, H, W) float32 in channels_last memory."""
        return (pixels * self.scale - self.shift).permute(0, 3, 1, 2)

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw from (seed, epoch) for each image that is served.

        Returns:
            Its place among the training images, five uniform numbers, whether it is mirrored, and the numbers
            of its policy.
        """
        n, draw = len(self.labels), torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        orders = [torch.randperm(n, generator=draw) for _ in range(-(-self.served // n))]
        order = torch.cat(orders)[: self.served]
        numbers = torch.rand(self.served, 5, generator=draw)
        flip = (numbers[:, 0] < 0.5) if self.data.flip else torch.zeros(self.served, dtype=torch.bool)
        policy = torch.rand(self.served, self.policy.draws if self.policy else 0, generator=draw)
        return order, numbers, flip, policy

    def _vary(self, pixels: Tensor, draws: Tensor) -> Tensor:
        """Change (B, H, W, 3) uint8 by the policy, where there is one."""
        return self.policy.vary(pixels, draws) if self.policy and len(pixels) else pixels

    def size(self, step: int) -> int:
        """Return how many images the batch of a step (of an epoch, from 0) has in all processes together."""
        return min(self.batch_size, self.served - step * self.batch_size)

    def _part(self, step: int) -> slice:
        """Return which places in the order of an epoch make up this process's part of the batch of a step."""
        return slice(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)

    def _test_parts(self, batch_size: int) -> list[slice]:
        """Return which held-out images make up each of this process's batches."""
        return [
            slice(i, i + batch_size * self.world, self.world)
            for i in range(self.rank, len(self.data.test_labels), batch_size * self.world)
        ]

    def _resample(self, pixels: Tensor, maps: Tensor) -> Tensor:
        """Normalize (B, H, W, 3) uint8 and crop by an affine map each, (B, 2, 3): (B, 3, size, size)."""
        size = self.data.image_size
        if not len(pixels):  # affine_grid refuses it
            return self._normalize(pixels[:, :size, :size])
        x = self._normalize(pixels)
        grid = F.affine_grid(maps, [len(x), 3, size, size], align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False).contiguous(
            memory_format=torch.channels_last
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x (B, 3, H, W) float32, y (B,)) of one epoch, from step ``start`` on."""
        order, numbers, flip, policy = self._draw(epoch)
        if self.data.pad is None:
            maps = crop_maps(numbers, flip).to(self.device)  # (n, 2, 3)
        else:
            span = torch.arange(self.data.image_size)
            corner = (numbers[:, 1:3] * (2 * self.data.pad + 1)).long()  # (n, 2)
            rows = corner[:, :1] + span  # (n, H)
            columns = corner[:, 1:] + torch.where(flip[:, None], span.flip(0), span)  # (n, W)
            rows, columns = rows.to(self.device), columns.to(self.device)
        order = order.to(self.device)
        for part in map(self._part, range(start, self.steps)):
            which = order[part]
            if self.data.pad is None:
                x = self._resample(self._vary(self.images[which], policy[part]), maps[part])
            else:
                crops = self.images[which[:, None, None], rows[part, :, None], columns[part, None, :]]
                x = self._normalize(self._vary(crops, policy[part]))
            yield x, self.labels[which]

    def test(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the held-out images in order, unaugmented; of several processes each gets its part of them.

        None is 128 images at a time on a CPU, whose caches hold no more of a network's activations, and 1000
        elsewhere.
        """
        batch_size = batch_size or (128 if self.device.type == "cpu" else 1000)
        for part in self._test_parts(batch_size):
            yield self._normalize(self.test_images[part]), self.test_labels[part]


def crop_maps(numbers: Tensor, flip: Tensor) -> Tensor:
    """Turn uniform numbers (n, 5) into affine maps (n, 2, 3): area 8–100 %, aspect 3/4 to 4/3, any place."""
    area = 0.08 + 0.92 * numbers[:, 1]
    aspect = torch.exp((numbers[:, 2] * 2 - 1) * np.log(4 / 3))
    width, height = ((area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1))
    x, y = (1 - width) * (2 * numbers[:, 3] - 1), (1 - height) * (2 * numbers[:, 4] - 1)
    zero = torch.zeros_like(x)
    return torch.stack([torch.where(flip, -width, width), zero, x, zero, height, y], dim=1).reshape(-1, 2, 3)
