"""Images with boxes or masks, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lrpet.data.cache import DataError
from lrpet.data.stream import start_worker, worker_count

__all__ = ["IGNORED", "Annotated", "ObjectBatches", "ObjectData"]
IGNORED = 255  # class of pixels that are neither trained on nor scored, as the borders in VOC
AT_A_TIME = 8  # held-out images


class Annotated(NamedTuple):
    """An image and what is known of it."""

    image: Tensor  # (3, H, W) uint8
    boxes: Tensor  # (n, 4) float32: x1, y1, x2, y2 in pixels, the far edges not part of it
    labels: Tensor  # (n,) int64, from 0
    crowd: Tensor  # (n,) bool: neither trained on nor scored, as VOC's difficult objects
    mask: Tensor | None = None  # (H, W) int64: class of each pixel, 0 for the ground


@dataclass(frozen=True)
class ObjectData:
    """A data set of annotated images, which are decoded or made when they are asked for."""

    task: str  # detection | segmentation
    train: Sequence  # of Annotated
    test: Sequence
    classes: tuple[str, ...]  # of a detector its objects; of a segmenter all, the ground first
    mean: tuple[float, ...]  # of pixels scaled to [0, 1]
    std: tuple[float, ...]
    image_size: int  # edge of the square that the network sees
    flip: bool  # random horizontal flip
    jitter: str  # a row of lrpet.data.vary.JITTER
    fingerprint: dict[str, str]  # tells copies of the data apart, by the names of ImageData's
    workers: bool  # let processes decode
    backbone: Path | None = None  # file of the weights that the network's backbone begins with


class _Varied(Dataset):
    """Decodes and varies in whatever process: (training, i, seed) → image, target, or what is wrong."""

    def __init__(self, data: ObjectData):
        from lrpet.data.vary import Variations  # torchvision takes 2 s to import

        self.data = data
        self.variations = {training: Variations(data, training=training) for training in (True, False)}

    def __getitem__(self, job: tuple[bool, int, int]):
        training, i, seed = job
        try:
            annotated = (self.data.train if training else self.data.test)[i]
            return *self.variations[training](annotated, seed), ""
        except DataError as error:  # raised where the batch is wanted, without the worker's traceback
            return torch.empty(0), torch.empty(0), str(error)


def _collate(samples: list[tuple[Tensor, Tensor, str]]) -> tuple[Tensor, Tensor, str]:
    images, targets, wrong = zip(*samples, strict=True)
    error = next(filter(None, wrong), "")
    if error:
        return torch.empty(0), torch.empty(0), error
    if targets[0].dim() == 2 and targets[0].shape[1:] == (6,):  # of detectors; where there is no box, zeros
        return torch.stack(images), pad_sequence(list(targets), batch_first=True), ""
    return torch.stack(images), torch.stack(targets), ""


class ObjectBatches:
    """Serves normalized batches of annotated images, as :class:`lrpet.data.batches.Batches` serves labels.

    The order of an epoch and what varies its images are drawn from (seed, epoch) alone. The incomplete last
    batch of an epoch is left out. Targets are (B, n, 6), filled up with zeros to the image of most boxes, or
    (B, S, S); see :class:`lrpet.data.vary.Variations`.

    Args:
        data: the images.
        batch_size: images per batch, of all processes together.
        device: where batches are served.
        seed: of the run.
        rank, world: which process this is, of how many; it serves every ``world``-th image.

    Raises:
        DataError: fewer training images than a batch has, or than there are processes.
    """

    def __init__(
        self,
        data: ObjectData,
        batch_size: int,
        device: str | torch.device,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.data, self.batch_size, self.device = data, batch_size, torch.device(device)
        self.seed, self.rank, self.world = seed, rank, world
        self.steps = len(data.train) // batch_size
        self.served = self.steps * batch_size  # images in an epoch
        if not self.steps or batch_size < world:
            raise DataError(
                f"batch_size must be between {world}, an image for each process, and {len(data.train)}, the "
                f"training images; got {batch_size}"
            )
        std, mean = (torch.tensor(values, device=self.device) for values in (data.std, data.mean))
        self.scale, self.shift = 1 / (255 * std)[:, None, None], (mean / std)[:, None, None]
        self._jobs: list[list[tuple[bool, int, int]]] = []
        workers = worker_count() if data.workers else 0
        self.loader = DataLoader(
            _Varied(data),
            batch_sampler=self._jobs,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # not the one of the training, whose state a checkpoint keeps
            worker_init_fn=start_worker,
        )

    def size(self, step: int) -> int:
        """Return how many images the batch of a step has in all processes together."""
        return self.batch_size

    def _serve(self, jobs: list[list[tuple[bool, int, int]]]) -> Iterator[tuple[Tensor, Tensor]]:
        self._jobs[:] = jobs
        for pixels, target, wrong in self.loader:
            if wrong:
                raise DataError(wrong)
            x = pixels.to(self.device, non_blocking=True) * self.scale - self.shift
            yield x.contiguous(memory_format=torch.channels_last), target.to(self.device, non_blocking=True)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x (B, 3, S, S) float32, target) of one epoch, from step ``start`` on."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.data.train), generator=draw).tolist()
        seeds = torch.randint(2**48, (self.served,), generator=draw).tolist()
        jobs = []
        for step in range(start, self.steps):
            places = range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)
            jobs.append([(True, order[place], seeds[place]) for place in places])
        return self._serve(jobs)

    def test(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the held-out images in order, as they are; of several processes each gets its part of them.

        The ``i``-th image that a process gets is number ``rank + i · world``.
        """
        mine = range(self.rank, len(self.data.test), self.world)
        size = batch_size or AT_A_TIME
        return self._serve(
            [[(False, i, 0) for i in mine[first : first + size]] for first in range(0, len(mine), size)]
        )
