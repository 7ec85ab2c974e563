"""A small tree of JPEG files, made of the embedded digits: everything that reads a large one runs on it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from lrpet.config import RunConfig
from lrpet.data.sets import load_data
from lrpet.paths import cache_folder

__all__ = ["make_digits_tree"]


def make_digits_tree(
    folder: str | Path | None = None, *, classes: int = 6, train: int = 32, val: int = 10
) -> Path:
    """Draw digits as JPEG files of 48 to 120 pixels into ``train/`` and ``val/``, one folder per digit.

    Args:
        folder: where; None is a folder beside the decoded images, which git ignores. An existing one is kept.
        classes: how many of the ten digits.
        train: images per class.
        val: held-out images per class.

    Returns:
        The folder.

    Source: UCI "Optical Recognition of Handwritten Digits", through scikit-learn.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     root = make_digits_tree(Path(place) / "tree", classes=2, train=3, val=1)
    ...     sorted(str(file.relative_to(root)) for file in root.rglob("*.jpg"))[:3]
    ['train/0/0.jpg', 'train/0/1.jpg', 'train/0/2.jpg']
    """
    folder = cache_folder() / f"digits-{classes}-{train}-{val}" if folder is None else Path(folder)
    if folder.is_dir():
        return folder
    data, part = load_data(RunConfig()), folder.with_name(f"{folder.name}.part{os.getpid()}")
    sizes = np.random.default_rng(0)
    for split, count, images, labels in (
        ("train", train, data.train_images, data.train_labels),
        ("val", val, data.test_images, data.test_labels),
    ):
        for digit in range(classes):
            place = part / split / str(digit)
            place.mkdir(parents=True)
            for i, image in enumerate(images[labels == digit][:count]):
                width, height = (int(edge) for edge in sizes.integers(48, 121, 2))
                Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.BICUBIC).save(
                    place / f"{i}.jpg", quality=90
                )
    try:
        part.rename(folder)  # there as a whole, or not at all
    except OSError:  # another process was faster
        if not folder.is_dir():
            raise
        shutil.rmtree(part)
    return folder
