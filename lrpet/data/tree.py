"""A tree of image files: which images it holds, of which classes, and which are held out."""

from __future__ import annotations

import json
import os
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lrpet.data.cache import DataError, cache_names
from lrpet.files import write_whole
from lrpet.paths import cache_folder

__all__ = ["ON_CORRUPT", "central_square", "list_images", "open_image"]
ON_CORRUPT = ("stop", "skip")  # what to do about an image that cannot be decoded


def held_out(count: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Return which of ``count`` training images are held out and which are left, the same ones for every seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    cut = round(fraction * count)
    if not 0 < cut < count:
        raise DataError(
            f"validation_fraction {fraction} of {count} training images leaves one side empty; choose another"
        )
    return order[:cut], order[cut:]


def list_images(root: Path | None, on_corrupt: str = "stop"):
    """Return (path, label) of the training and of the held-out images of a tree, its classes, and the images that are left out.

    Args:
        root: folder with train/ and val/ (or test/), or with a folder a class.
        on_corrupt: "skip" looks through all images, once a tree, and leaves out those that cannot be decoded; each is named.

    Raises:
        DataError: no tree of images, one that cannot be read, or one of which a class is corrupt as a whole.
    """
    if root is None:
        raise DataError(
            "dataset 'imagefolder' needs a folder with train/ and val/ (or test/): give it by --data or LRPET_DATA"
        )
    try:
        train, test, classes = _list_tree(root)
        corrupt = _find_corrupt(root, train + test) if on_corrupt == "skip" else {}
    except OSError as error:
        raise DataError(
            f"{root} must be a folder of images that can be read; got: {error}. Allow reading or give another --data"
        ) from error
    for reason in corrupt.values():
        print(f"left out: {reason}", flush=True)
    if corrupt:
        print(f"{len(corrupt)} of {len(train + test)} images are corrupt and left out", flush=True)
    train, test = ([(path, label) for path, label in part if path not in corrupt] for part in (train, test))
    if {label for _, label in train} != set(range(len(classes))) or not test:
        raise DataError(
            f"{root} has a class, or a held-out part, of which no image can be decoded; unpack it again"
        )
    return train, test, classes, tuple(corrupt)


def _find_corrupt(root: Path, files: list[tuple[str, int]]) -> dict[str, str]:
    """Return path → what is wrong with it for every image that cannot be decoded; kept, so that a tree is looked through once."""
    place, content = cache_names(root, "corrupt", files)
    file = cache_folder() / f"{place}-corrupt-{content}.json"
    if not file.is_file():
        print(f"looking through {len(files)} images for corrupt ones, once", flush=True)
        with ThreadPool(os.cpu_count()) as pool:
            reasons = pool.imap(_wrong_with, (path for path, _ in files), chunksize=64)
            corrupt = {
                os.path.relpath(path, root): reason
                for (path, _), reason in zip(files, reasons, strict=True)
                if reason
            }
        file.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(file) as out:
            out.write(json.dumps(corrupt).encode())
    return {str(root / path): reason for path, reason in json.loads(file.read_bytes()).items()}


def _wrong_with(path: str) -> str:
    try:
        open_image(path)
    except DataError as error:
        return str(error)
    return ""


def _list_tree(root: Path) -> tuple[list[tuple[str, int]], list[tuple[str, int]], tuple[str, ...]]:
    """Return the (path, label) pairs of the training and the held-out images, and the classes, after checking the tree.

    Without a folder train/, the folders in ``root`` are the classes, and every fifth image of each, by name, is held out.
    """
    from torchvision.datasets import ImageFolder

    if not root.is_dir():
        raise DataError(
            f"{root} is no folder; it must hold train/ and test/ (or val/), or a folder a class: give another --data"
        )
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    split = (root / "train").is_dir()
    if split != (held_out is not None):
        wanted = "must hold train/ and test/ (or val/), or neither and a folder a class"
        raise DataError(f"{root} {wanted}; unpack the images again or give another --data")
    try:
        train, test = (
            (ImageFolder(folder) for folder in (root / "train", held_out))
            if split
            else (ImageFolder(root), None)
        )
    except FileNotFoundError as error:
        raise DataError(
            f"{root} has a class without images, or no class: {error}. Unpack it again, or remove the empty folder"
        ) from error
    if split and train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"train/ and {held_out.name}/ of {root} hold different classes (only one has {odd[0]!r}); unpack it again"
        )
    if len(train.classes) < 2:
        raise DataError(
            f"{root} has one class, {train.classes[0]!r}; a classifier needs at least two folders of images"
        )
    if split:
        return train.samples, test.samples, tuple(train.classes)
    place = Counter()  # of an image within its class
    parts = ([], [])
    for path, label in train.samples:
        place[label] += 1
        parts[place[label] % 5 == 0].append((path, label))
    if len({label for _, label in parts[1]}) < len(train.classes):
        raise DataError(
            f"{root} has a class of fewer than five images, of which none can be held out; add images, or make train/ and val/"
        )
    return *parts, tuple(train.classes)


def open_image(path: str) -> Image.Image:
    """Decode an image of any format to RGB.

    Raises:
        DataError: it cannot be decoded; names it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be decoded ({error}); replace or remove it, or leave such images out by on_corrupt 'skip'"
        ) from error


def central_square(image: Image.Image, short: int, size: int) -> np.ndarray:
    """Resize the shorter side to ``short`` pixels and cut out the central square, (size, size, 3) uint8.

    >>> central_square(Image.new("RGB", (30, 20)), 12, 10).shape
    (10, 10, 3)
    """
    scale = short / min(image.size)
    image = image.resize([max(short, round(edge * scale)) for edge in image.size], Image.Resampling.BILINEAR)
    left, top = ((edge - size) // 2 for edge in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))
