"""Scenes with known boxes and masks, made on the fly: digits or CIFAR-10 images on textured ground.

They are no photographs, and what holds on them need not hold on VOC: they are for seeing detection and
segmentation work without a data set of either.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lrpet.data.objects import Annotated
from lrpet.data.sets import ImageData

__all__ = ["SCENES", "Scenes", "scenes_of"]
SCENES = {  # data set → source of its objects, training and held-out scenes
    "digit_scenes": ("digits", 400, 100),
    "cifar_scenes": ("cifar10", 2400, 400),
}
OBJECTS = (1, 4)  # in a scene, fewest and most
SHARE = (0.18, 0.42)  # of a scene's edge: shortest and longest edge of an object
ASPECT = 1.3  # width to height, at most, and its inverse
TRIES = 10  # places for an object before it is left out
GROUND = (4, 16)  # patches of colour along an edge, coarse and fine
VERSION = "scenes 1"  # of what is drawn; part of the fingerprint


@dataclass(frozen=True)
class Scenes:
    """Scenes of one split: the i-th is the same wherever and whenever it is made.

    Args:
        images: that objects are cut from, uint8 (n, h, w, 3).
        labels: of theirs, (n,).
        count: of scenes.
        size: edge of a scene in pixels.
        split: "train" or "test"; no scene is in both.
        round_off: cut objects out as ellipses; else where they are brighter than their ground, as digits are.

    >>> from lrpet.config import RunConfig
    >>> from lrpet.data.sets import load_data
    >>> digits = load_data(RunConfig())
    >>> scenes = Scenes(digits.train_images, digits.train_labels, 8, 64, "train")
    >>> scene = scenes[3]
    >>> scene.image.shape, len(scene.boxes) == len(scene.labels), scene.mask.shape
    (torch.Size([3, 64, 64]), True, torch.Size([64, 64]))
    """

    images: Tensor
    labels: Tensor
    count: int
    size: int
    split: str
    round_off: bool = False

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Annotated:
        """Return the i-th scene. Objects do not overlap, so a box is exactly what its mask spans."""
        if not 0 <= i < self.count:
            raise IndexError(f"a scene must be between 0 and {self.count - 1}; got {i}")
        return _make_scene(self, np.random.default_rng([i, self.split == "train"]))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the images that objects are cut from, and how scenes are made of them."""
        digest = hashlib.sha256(f"{VERSION} {self.count} {self.size} {self.split}".encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def scenes_of(source: ImageData, counts: tuple[int, int], size: int) -> tuple[Scenes, Scenes]:
    """Return the scenes to train on and those to score, made of the images of either part."""
    round_off = source.image_size > 8  # photographs fill their square
    parts = ((source.train_images, source.train_labels), (source.test_images, source.test_labels))
    return tuple(
        Scenes(*part, count, size, split, round_off)
        for part, count, split in zip(parts, counts, ("train", "test"), strict=True)
    )


def _make_scene(scenes: Scenes, draw: np.random.Generator) -> Annotated:
    size = scenes.size
    image, mask = _ground(size, draw), torch.zeros(size, size, dtype=torch.int64)
    boxes, labels = [], []
    for _ in range(draw.integers(OBJECTS[0], OBJECTS[1] + 1)):
        which = int(draw.integers(len(scenes.images)))
        label = int(scenes.labels[which])
        patch, opaque = _cut(scenes.images[which], scenes.round_off, size, draw)  # (3, h, w), (h, w)
        h, w = opaque.shape
        for _ in range(TRIES):
            y, x = (int(draw.integers(size - edge + 1)) for edge in (h, w))
            place = slice(y, y + h), slice(x, x + w)
            if not mask[place].any():
                image[:, *place] = torch.where(opaque, patch, image[:, *place])
                mask[place] = opaque * (1 + label)
                boxes.append([x, y, x + w, y + h])
                labels.append(label)
                break
    return Annotated(
        image.clamp(0, 255).round().to(torch.uint8),
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.zeros(len(labels), dtype=torch.bool),
        mask,
    )


def _ground(size: int, draw: np.random.Generator) -> Tensor:
    """Return patches of colour, coarse and fine, with noise: (3, S, S) float between 0 and 255."""
    ground = torch.full((1, 3, size, size), 0.0)
    for cells, depth in zip(GROUND, (110.0, 50.0), strict=True):
        colours = torch.from_numpy(draw.random((1, 3, cells, cells), dtype=np.float32))
        ground += depth * F.interpolate(colours, (size, size), mode="bilinear", align_corners=False)
    noise = torch.from_numpy(draw.normal(0, 8, (3, size, size)).astype(np.float32))
    return ground[0] + noise


def _cut(image: Tensor, round_off: bool, size: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return an object of random size and, where it is a digit, of random colour, and where it is opaque."""
    aspect, edge = ASPECT ** draw.uniform(-1, 1), draw.uniform(*SHARE) * size
    h, w = max(4, round(edge / aspect**0.5)), max(4, round(edge * aspect**0.5))
    pixels = image.permute(2, 0, 1)[None].float()
    if round_off:
        patch = F.interpolate(pixels, (h, w), mode="bilinear", align_corners=False)[0]
        y, x = torch.linspace(-0.98, 0.98, h)[:, None], torch.linspace(-0.98, 0.98, w)
        return patch, y.abs() ** 4 + x.abs() ** 4 <= 1.0  # nearly a rectangle, its corners rounded
    ink = F.interpolate(pixels[:, :1], (h, w), mode="bilinear", align_corners=False)[0, 0] > 90
    rows, columns = ink.any(1).nonzero()[:, 0], ink.any(0).nonzero()[:, 0]
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    colour = torch.from_numpy(draw.uniform(180, 255, 3).astype(np.float32))
    return colour[:, None, None].expand(3, *ink.shape), ink
