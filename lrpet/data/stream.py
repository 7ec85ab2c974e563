"""Images that do not fit into memory, decoded by worker processes while the device trains."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lrpet.data.batches import Batches, crop_maps
from lrpet.data.cache import DataError
from lrpet.data.pixels import central_square, open_image
from lrpet.data.sets import MEAN, STD, stored_side

__all__ = ["StreamBatches", "StreamData", "worker_count"]


@dataclass(frozen=True)
class StreamData:
    """A tree of images of which only the file names are in memory."""

    root: Path
    train_files: list[str]
    train_labels: Tensor
    test_files: list[str]
    test_labels: Tensor
    classes: tuple[str, ...]
    image_size: int  # pixels that the network sees
    crops: str  # square | whole, as in RunConfig
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    pad: None = field(default=None, init=False)
    flip: bool = field(default=True, init=False)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256 over name, size and label of each file: reading all would take as long as an epoch."""

        def digest(files: list[str], labels: Tensor) -> str:
            lines = (
                f"{os.path.relpath(f, self.root)} {os.stat(f).st_size} {y}\n"
                for f, y in zip(files, labels.tolist(), strict=True)
            )
            return "files:" + hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()

        return {
            "data_train_sha256": digest(self.train_files, self.train_labels),
            "data_test_sha256": digest(self.test_files, self.test_labels),
        }


def worker_count() -> int:
    """Return how many processes decode: the cores that may be used, divided among those of a torchrun."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class _Decoder(Dataset):
    """Decodes a batch in a worker process: (kind, files, seeds) → (B, H, W, 3) uint8, or what is wrong."""

    def __init__(self, size: int):
        from torchvision.transforms import v2

        self.size, self.random_crop = size, v2.RandomResizedCrop(size, antialias=True)

    def _decode(self, kind: str, file: str, seed: int) -> np.ndarray:
        from torchvision.transforms.v2 import functional as F

        image, short = open_image(file), stored_side(self.size)
        if kind == "whole":
            torch.default_generator.manual_seed(seed)  # of this worker process, which draws nothing else
            return self.random_crop(F.pil_to_tensor(image)).permute(1, 2, 0).numpy()
        return central_square(image, short, self.size if kind == "test" else short)

    def __getitem__(self, job: tuple[str, list[str], list[int]]) -> tuple[Tensor, str]:
        kind, files, seeds = job
        try:
            pixels = [self._decode(kind, *one) for one in zip(files, seeds, strict=True)]
            batch = np.stack(pixels) if pixels else np.empty((0, self.size, self.size, 3), np.uint8)
            return torch.from_numpy(batch), ""
        except DataError as error:  # raised where the batch is wanted, without the worker's traceback
            return torch.empty(0), str(error)


def start_worker(_number: int) -> None:
    # Ctrl-C reaches every process of a terminal; the one that trains decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class StreamBatches(Batches):
    """Serves batches of a tree that does not fit into memory, drawn as :class:`Batches` does.

    Worker processes, kept from epoch to epoch, decode whole batches to uint8, and crop them where the crop is
    taken of the whole image; they are pinned, and normalized, mirrored and otherwise cropped on the device.
    One pass at a time.

    Args:
        data: names of the files.
        batch_size: images per batch.
        device: where batches are served.
        seed: of the run.
        rank, world: which process this is, of how many.
    """

    data: StreamData

    def _place(self) -> None:
        self._jobs: list[tuple[str, list[str], list[int]]] = []  # what the workers do in a pass, a batch each
        self._passes = 0
        self.loader = DataLoader(
            _Decoder(self.data.image_size),
            batch_size=None,  # a job is a batch already
            sampler=self._jobs,
            num_workers=worker_count(),
            persistent_workers=True,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # not the one of the training, whose state a checkpoint keeps
            worker_init_fn=start_worker,
        )

    def _decoded(self, jobs: list[tuple[str, list[str], list[int]]]) -> Iterator[Tensor]:
        """Yield the pixels (B, H, W, 3) of one job after the other, on the device."""
        self._jobs[:] = jobs
        self._passes += 1
        mine = self._passes
        for pixels, wrong in self.loader if jobs else ():
            if wrong:
                raise DataError(wrong)
            yield pixels.to(self.device, non_blocking=True)
            if mine != self._passes:
                raise RuntimeError(
                    "a pass over streamed images was begun before the last one had ended; "
                    "take one after the other"
                )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x (B, 3, H, W) float32, y (B,)) of one epoch, from step ``start`` on."""
        order, numbers, flip, policy = self._draw(epoch)
        both = torch.tensor([2.0**24, 1.0], dtype=torch.float64)
        seeds = (numbers[:, 1:3].double() * 2**24 @ both).long()  # (n,), all 48 bits drawn
        parts = [self._part(step) for step in range(start, self.steps)]
        jobs = [
            (self.data.crops, [self.data.train_files[i] for i in order[part].tolist()], seeds[part].tolist())
            for part in parts
        ]
        maps = crop_maps(numbers, flip).to(self.device)
        flip, order = flip.to(self.device), order.to(self.device)
        for part, pixels in zip(parts, self._decoded(jobs), strict=True):
            pixels = self._vary(pixels, policy[part])
            if self.data.crops == "whole":
                x = self._normalize(torch.where(flip[part, None, None, None], pixels.flip(2), pixels))
            else:
                x = self._resample(pixels, maps[part])
            yield x, self.labels[order[part]]

    def test(self, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the held-out images in order, unaugmented; each process gets its part of them."""
        files, labels = self.data.test_files, self.data.test_labels.to(self.device)
        parts = self._test_parts(batch_size)
        jobs = [("test", files[part], [0] * len(files[part])) for part in parts]
        for part, pixels in zip(parts, self._decoded(jobs), strict=True):
            yield self._normalize(pixels), labels[part]
