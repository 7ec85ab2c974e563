"""Image files to arrays of one size."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from lrpet.data.cache import DataError, cache_names, read_cache
from lrpet.data.pixels import central_square, open_image
from lrpet.data.tree import list_images
from lrpet.files import write_whole
from lrpet.paths import cache_folder


def read_tree(root: Path, short: int | None, train_size: int, test_size: int):
    """Return images, labels and classes of an ImageFolder tree, from the cache where it was decoded before.

    The shorter side is resized to ``short`` pixels and the central square cut out; None takes only images
    that fit.
    """
    train, test, classes = list_images(root)
    place, content = cache_names(root, f"{short} {train_size} {test_size}", train + test)
    arrays = []
    for split, files, size in (("train", train, train_size), ("test", test, test_size)):
        paths, labels = [path for path, _ in files], torch.tensor([label for _, label in files])
        arrays += [torch.from_numpy(_cached(f"{place}-{split}", content, paths, short, size)), labels]
    return *arrays, classes


def _cached(name: str, content: str, paths: list[str], short: int | None, size: int) -> np.ndarray:
    """Return the decoded images of a split; of runs that start together one decodes, the others wait."""
    cache = cache_folder()
    file, shape = cache / f"{name}-{content}.cache", (len(paths), size, size, 3)
    images = read_cache(file, shape)
    if images is not None:
        return images
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{name}.lock").acquire()
    except OSError as error:
        wanted = "the cache of decoded images must be a folder that can be written"
        raise DataError(f"{wanted}; got {cache}: {error.strerror}; set LRPET_CACHE") from error
    with lock:
        images = read_cache(file, shape)
        if images is None:
            images = _decode(paths, short, size)
            with write_whole(file) as out:
                out.write(images.data)
                out.write(hashlib.sha256(images.data).digest())
            for old in set(cache.glob(f"{name}-*")) - {file}:  # of this folder before its images changed
                with suppress(OSError):  # another user's, which costs room alone
                    old.unlink()
    return images


def _decode(paths: list[str], short: int | None, size: int) -> np.ndarray:
    """Decode files to (n, size, size, 3) uint8, several at a time: Pillow releases the interpreter lock."""

    def decode(path: str) -> np.ndarray:
        image = open_image(path)
        if short is not None:
            return central_square(image, short, size)
        if image.size != (size, size):
            raise DataError(
                f"{path} is {image.width}×{image.height} pixels, not {size}×{size}; "
                "use dataset='imagefolder' for such images"
            )
        return np.asarray(image)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(decode, paths)))
