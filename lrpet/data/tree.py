"""A tree of image files: which images it holds, of which classes, and which are held out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lrpet.data.cache import DataError

__all__ = ["central_square", "held_out", "list_images", "open_image"]


def held_out(count: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Return which of ``count`` training images are held out and which are left, the same for every seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    cut = round(fraction * count)
    if not 0 < cut < count:
        raise DataError(
            f"validation_fraction {fraction} of {count} training images leaves one side empty; choose another"
        )
    return order[:cut], order[cut:]


def list_images(root: Path | None):
    """Return (path, label) of the training and of the held-out images of a tree, and its classes.

    Without a folder train/, the folders in ``root`` are the classes, and every fifth image of each, by name,
    is held out.

    Args:
        root: folder with train/ and val/ (or test/), or with one folder per class.

    Raises:
        DataError: no tree of images, or one that cannot be read.
    """
    if root is None:
        raise DataError(
            "dataset 'imagefolder' needs a folder with train/ and val/ (or test/): "
            "give it by --data or LRPET_DATA"
        )
    try:
        return _list_tree(root)
    except OSError as error:
        raise DataError(
            f"{root} must be a folder of images that can be read; got: {error}. "
            "Allow reading or give another --data"
        ) from error


def _list_tree(root: Path) -> tuple[list[tuple[str, int]], list[tuple[str, int]], tuple[str, ...]]:
    from torchvision.datasets import ImageFolder

    shape = "train/ and test/ (or val/), or one folder per class"
    if not root.is_dir():
        raise DataError(f"{root} is no folder; it must hold {shape}: give another --data")
    other = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    split = (root / "train").is_dir()
    if split != (other is not None):
        raise DataError(
            f"{root} must hold {shape}; got one of two: unpack the images again or give another --data"
        )
    try:
        train = ImageFolder(root / "train" if split else root)
        test = ImageFolder(other) if split else None
    except FileNotFoundError as error:
        raise DataError(
            f"{root} has a class without images, or no class: {error}. "
            "Unpack it again, or remove the empty folder"
        ) from error
    if split and train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"train/ and {other.name}/ of {root} hold different classes (only one has {odd[0]!r}); "
            "unpack it again"
        )
    if len(train.classes) < 2:
        raise DataError(
            f"{root} has one class, {train.classes[0]!r}; a classifier needs at least two folders of images"
        )
    if split:
        return train.samples, test.samples, tuple(train.classes)
    return *_every_fifth(root, train.samples, len(train.classes)), tuple(train.classes)


def _every_fifth(root: Path, samples: list[tuple[str, int]], classes: int) -> tuple[list, list]:
    """Divide images into those to train on and every fifth of each class, which is held out."""
    place = Counter()  # of an image within its class
    parts = ([], [])
    for path, label in samples:
        place[label] += 1
        parts[place[label] % 5 == 0].append((path, label))
    if len({label for _, label in parts[1]}) < classes:
        raise DataError(
            f"{root} has a class of fewer than five images, of which none can be held out; "
            "add images, or make train/ and val/"
        )
    return parts


def open_image(path: str) -> Image.Image:
    """Decode an image of any format to RGB.

    Raises:
        DataError: it cannot be decoded; names it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded ({error}); replace or remove it") from error


def central_square(image: Image.Image, short: int, size: int) -> np.ndarray:
    """Resize the shorter side to ``short`` pixels and cut out the central square, (size, size, 3) uint8.

    >>> central_square(Image.new("RGB", (30, 20)), 12, 10).shape
    (10, 10, 3)
    """
    scale = short / min(image.size)
    image = image.resize([max(short, round(edge * scale)) for edge in image.size], Image.Resampling.BILINEAR)
    left, top = ((edge - size) // 2 for edge in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))
