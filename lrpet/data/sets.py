"""The data sets as images in memory: digits, CIFAR-10 and CIFAR-100, and any tree of folders."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lrpet.config import RunConfig
from lrpet.data.cache import DataError
from lrpet.data.decode import read_tree
from lrpet.data.tree import held_out
from lrpet.paths import data_folder, project_file

__all__ = ["ImageData", "load_data"]
CIFAR = {  # name → class in torchvision, its files, classes, mean and deviation of the pixels
    "cifar10": (
        *("CIFAR10", ("cifar-10-batches-py", "cifar-10-python.tar.gz"), 10),
        *((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    ),
    "cifar100": (
        *("CIFAR100", ("cifar-100-python", "cifar-100-python.tar.gz"), 100),
        *((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, scaled to [0, 1]


@dataclass(frozen=True)
class ImageData:
    """A data set in memory: uint8 images (n, H, W, 3), labels (n,), and how training images are varied."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # of pixels scaled to [0, 1]
    std: tuple[float, ...]
    image_size: int  # pixels that the network sees
    pad: int | None  # random crop after padding by this many pixels; None: random resized crop
    flip: bool  # random horizontal flip

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256 over pixels and labels of each split: tells copies of a data set apart."""
        return {
            "data_train_sha256": _digest(self.train_images, self.train_labels),
            "data_test_sha256": _digest(self.test_images, self.test_labels),
        }


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().data)  # read in place: images may fill half of the memory
    return digest.hexdigest()


def load_data(config: RunConfig, root: str | Path | None = None) -> ImageData:
    """Load the data set of a configuration into memory; :mod:`lrpet.data.load` is for what does not fit.

    Args:
        config: its ``dataset``, ``image_size``, ``crops`` and ``validation_fraction`` are read.
        root: folder of the images (``--data``); None takes ``LRPET_DATA``, and for CIFAR without either
            torchvision downloads to ``data/`` of the project, to an empty ``root`` too. digits needs none.

    Returns:
        The images. With ``validation_fraction`` > 0 the "test" part is held out from the training
        images, the same ones for every seed, and the real test set is not touched.

    Raises:
        DataError: missing, incomplete or damaged data, or crops that need the whole images.

    Source: Krizhevsky 2009 for CIFAR; UCI "Optical Recognition of Handwritten Digits" through
    scikit-learn for digits; mean, deviation and augmentation as in arXiv 2204.05566, experimental settings,
    and for CIFAR-100 as in its authors' code.

    >>> load_data(RunConfig()).train_images.shape
    torch.Size([1297, 8, 8, 3])
    """
    root = data_folder(root)
    if config.dataset == "digits":
        data = _digits()
    elif config.dataset in CIFAR:
        data = _cifar(config.dataset, root)
    else:
        if config.crops is not None:
            raise DataError(
                f"crops {config.crops!r} cannot be taken from memory, where a square of each image is kept; "
                "use lrpet.data.load_images"
            )
        data = _imagefolder(root, config.image_size)
    return _hold_out(data, config.validation_fraction) if config.validation_fraction else data


def _hold_out(data: ImageData, fraction: float) -> ImageData:
    held, rest = held_out(len(data.train_labels), fraction)
    images = data.train_images[held]
    if images.shape[1] != data.image_size:  # stored larger for random resized crops
        edge = (images.shape[1] - data.image_size) // 2
        images = images[:, edge : edge + data.image_size, edge : edge + data.image_size].contiguous()
    return replace(
        data,
        train_images=data.train_images[rest],
        train_labels=data.train_labels[rest],
        test_images=images,
        test_labels=data.train_labels[held],
    )


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    grey = np.round(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    images = torch.from_numpy(grey).expand(-1, -1, -1, 3).contiguous()
    labels = torch.from_numpy(labels).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # writers come in blocks
    train, test = order[:1297], order[1297:]
    return ImageData(
        images[train],
        labels[train],
        images[test],
        labels[test],
        tuple("0123456789"),
        (0.306,) * 3,
        (0.377,) * 3,
        8,
        pad=1,
        flip=False,
    )


def _cifar(dataset: str, root: Path | None) -> ImageData:
    name, files, count, mean, std = CIFAR[dataset]
    title = name.replace("CIFAR", "CIFAR-")
    place = project_file(f"data/{dataset}", "set LRPET_DATA or give data=")
    if root is not None:
        place = _cifar_folder(root, title, files)
    if (place / "train").is_dir() and not any((place / file).exists() for file in files):
        train_x, train_y, test_x, test_y, classes = read_tree(place, None, 32, 32)
        if (len(train_y), len(test_y), len(classes)) != (50_000, 10_000, count):
            raise DataError(
                f"{place} holds {len(train_y)} training and {len(test_y)} test images "
                f"of {len(classes)} classes; {title} has 50000, 10000 and {count}. "
                "Unpack it again, or use dataset='imagefolder' for another set"
            )
    else:
        import torchvision.datasets

        try:
            load = getattr(torchvision.datasets, name)
            sets = [load(place, train=train, download=True) for train in (True, False)]
        except Exception as error:  # torchvision lets errors of urllib, tarfile and its own checks through
            raise DataError(
                f"{title} is not in {place} and could not be downloaded ({type(error).__name__}: {error}). "
                "Try again with a network, or give a folder with train/ and test/ by --data or LRPET_DATA"
            ) from error
        train_x, test_x = (torch.from_numpy(s.data) for s in sets)
        train_y, test_y = (torch.tensor(s.targets) for s in sets)
        classes = tuple(sets[0].classes)
    return ImageData(train_x, train_y, test_x, test_y, classes, mean, std, 32, pad=4, flip=True)


def _cifar_folder(root: Path, title: str, files: tuple[str, ...]) -> Path:
    """Return where a CIFAR is in a folder: there or one level deeper; an empty folder, to download it to.

    Its own files come before a tree of images, which may be of the other CIFAR: one folder can hold both.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder; give that of {title}, or an empty one to download it to")
    names = sorted(name for name in os.listdir(root) if not name.startswith("."))
    for wanted in (files, ("train",)):
        for place in (root, *(root / name for name in names)):
            if any((place / name).exists() for name in wanted):
                return place
    if names:
        raise DataError(
            f"{root} holds neither train/ nor {' nor '.join(files)}, but {', '.join(names[:5])}; "
            f"give the folder of {title}, or an empty one to download it to"
        )
    return root


def stored_side(size: int) -> int:
    """Return the shorter side, in pixels, of an image that is kept to be shown at ``size``: as 256 to 224."""
    return round(size * 256 / 224)


def _imagefolder(root: Path | None, size: int) -> ImageData:
    short = stored_side(size)
    return ImageData(*read_tree(root, short, short, size), MEAN, STD, size, pad=None, flip=True)
