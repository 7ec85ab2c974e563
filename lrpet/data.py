"""Images as uint8 on the device, decoded once, augmented there in whole batches."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image
from torch import Tensor

from lrpet.config import PROJECT, RunConfig
from lrpet.files import write_whole

__all__ = ["ON_CORRUPT", "Batches", "DataError", "ImageData", "cache_folder", "central_square", "list_images", "load_data", "open_image"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, scaled to [0, 1]
ON_CORRUPT = ("stop", "skip")  # what to do about an image that cannot be decoded


class DataError(ValueError):
    """The images are missing, incomplete or damaged; the text says which and what to do."""


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
    corrupt: tuple[str, ...] = ()  # images that could not be decoded and were left out

    @property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256 over pixels and labels of each split: tells copies of a data set apart."""
        splits = {"train": (self.train_images, self.train_labels), "test": (self.test_images, self.test_labels)}
        return {
            f"data_{split}_sha256": hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
            for split, (images, labels) in splits.items()
        }


def load_data(config: RunConfig, root: str | Path | None = None, on_corrupt: str = "stop") -> ImageData:
    """Load the data set that a configuration names into memory; :mod:`lrpet.streaming` is for what does not fit.

    Args:
        config: its ``dataset``, ``image_size``, ``crops`` and ``validation_fraction`` are read.
        root: folder of the images (``--data``); None takes ``LRPET_DATA``, and for CIFAR-10 without either
            torchvision downloads to ``data/`` of the project. digits needs none.
        on_corrupt: "stop" refuses a tree of which an image cannot be decoded, "skip" leaves such images out; imagefolder only.

    Returns:
        The images. With ``validation_fraction`` > 0 the "test" part is held out from the training
        images, the same ones for every seed, and the real test set is not touched.

    Raises:
        DataError: missing, incomplete or damaged data, or crops that need the whole images.

    Source: Krizhevsky 2009 for CIFAR-10; UCI "Optical Recognition of Handwritten Digits" through
    scikit-learn for digits; mean, deviation and augmentation as in arXiv 2204.05566, experimental settings.

    >>> load_data(RunConfig()).train_images.shape
    torch.Size([1297, 8, 8, 3])
    """
    root = data_folder(root)
    if config.dataset == "digits":
        data = _digits()
    elif config.dataset == "cifar10":
        data = _cifar10(root)
    else:
        if config.crops is not None:
            raise DataError(f"crops {config.crops!r} cannot be taken from memory, where a square of each image is kept; use lrpet.streaming")
        data = _imagefolder(root, config.image_size, on_corrupt)
    return _hold_out(data, config.validation_fraction) if config.validation_fraction else data


def data_folder(root: str | Path | None) -> Path | None:
    """Return the folder of the images: the given one, else ``LRPET_DATA``, else None."""
    root = root or os.environ.get("LRPET_DATA") or None
    return None if root is None else Path(root).expanduser()


def cache_folder() -> Path:
    """Return the folder of what is made from images once: ``LRPET_CACHE``, else ``data/cache`` of the project."""
    return Path(os.environ.get("LRPET_CACHE") or PROJECT / "data" / "cache").expanduser()


def held_out(count: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Return which of ``count`` training images are held out and which are left, the same ones for every seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    cut = round(fraction * count)
    if not 0 < cut < count:
        raise DataError(f"validation_fraction {fraction} of {count} training images leaves one side empty; choose another")
    return order[:cut], order[cut:]


def _hold_out(data: ImageData, fraction: float) -> ImageData:
    held, rest = held_out(len(data.train_labels), fraction)
    images = data.train_images[held]
    if images.shape[1] != data.image_size:  # stored larger for random resized crops
        edge = (images.shape[1] - data.image_size) // 2
        images = images[:, edge : edge + data.image_size, edge : edge + data.image_size].contiguous()
    parts = {"train_images": data.train_images[rest], "train_labels": data.train_labels[rest]}
    return ImageData(**{**data.__dict__, **parts, "test_images": images, "test_labels": data.train_labels[held]})


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.round(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)).expand(-1, -1, -1, 3).contiguous()
    labels = torch.from_numpy(labels).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # the writers come in blocks
    train, test = order[:1297], order[1297:]
    return ImageData(images[train], labels[train], images[test], labels[test], tuple("0123456789"), (0.306,) * 3, (0.377,) * 3, 8, pad=1, flip=False)


def _cifar10(root: Path | None) -> ImageData:
    place = root or PROJECT / "data" / "cifar10"
    if (place / "train").is_dir():
        train_x, train_y, test_x, test_y, classes, _ = _read_tree(place, None, 32, 32)
        if (len(train_y), len(test_y), len(classes)) != (50_000, 10_000, 10):
            raise DataError(
                f"{place} holds {len(train_y)} training and {len(test_y)} test images of {len(classes)} classes; CIFAR-10 has 50000, 10000 "
                "and 10. Unpack it again, or use dataset='imagefolder' for another set"
            )
    else:
        from torchvision.datasets import CIFAR10

        if root is not None and not (place / "cifar-10-batches-py").is_dir():
            raise DataError(f"{place} holds neither train/ nor cifar-10-batches-py/; give the folder of CIFAR-10, or none to download it")
        try:
            sets = [CIFAR10(place, train=train, download=True) for train in (True, False)]
        except Exception as error:  # torchvision lets errors of urllib, tarfile and its own checks through
            raise DataError(
                f"CIFAR-10 is not in {place} and could not be downloaded ({type(error).__name__}: {error}). Delete that folder and try again "
                "with a network, or give a folder with train/ and test/ by --data or LRPET_DATA"
            ) from error
        train_x, test_x = (torch.from_numpy(s.data) for s in sets)
        train_y, test_y = (torch.tensor(s.targets) for s in sets)
        classes = tuple(sets[0].classes)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    return ImageData(train_x, train_y, test_x, test_y, classes, mean, std, 32, pad=4, flip=True)


def stored_side(size: int) -> int:
    """Return to how many pixels the shorter side of an image is resized that is shown at ``size``: as 256 to 224."""
    return round(size * 256 / 224)


def _imagefolder(root: Path | None, size: int, on_corrupt: str) -> ImageData:
    short = stored_side(size)
    *parts, corrupt = _read_tree(root, short, short, size, on_corrupt)
    return ImageData(*parts, MEAN, STD, size, pad=None, flip=True, corrupt=corrupt)


def list_images(root: Path | None, on_corrupt: str = "stop"):
    """Return (path, label) of the training and of the held-out images of a tree, its classes, and the images that are left out.

    Args:
        root: folder with train/ and val/ (or test/), or with a folder a class.
        on_corrupt: "skip" looks through all images, once a tree, and leaves out those that cannot be decoded; each is named.

    Raises:
        DataError: no tree of images, one that cannot be read, or one of which a class is corrupt as a whole.
    """
    if root is None:
        raise DataError("dataset 'imagefolder' needs a folder with train/ and val/ (or test/): give it by --data or LRPET_DATA")
    try:
        train, test, classes = _list_tree(root)
        corrupt = _find_corrupt(root, train + test) if on_corrupt == "skip" else {}
    except OSError as error:
        raise DataError(f"{root} must be a folder of images that can be read; got: {error}. Allow reading or give another --data") from error
    for reason in corrupt.values():
        print(f"left out: {reason}", flush=True)
    if corrupt:
        print(f"{len(corrupt)} of {len(train + test)} images are corrupt and left out", flush=True)
    train, test = ([(path, label) for path, label in part if path not in corrupt] for part in (train, test))
    if {label for _, label in train} != set(range(len(classes))) or not test:
        raise DataError(f"{root} has a class, or a held-out part, of which no image can be decoded; unpack it again")
    return train, test, classes, tuple(corrupt)


def _find_corrupt(root: Path, files: list[tuple[str, int]]) -> dict[str, str]:
    """Return path → what is wrong with it for every image that cannot be decoded; kept, so that a tree is looked through once."""
    place, content = _names(root, "corrupt", files)
    file = cache_folder() / f"{place}-corrupt-{content}.json"
    if not file.is_file():
        print(f"looking through {len(files)} images for corrupt ones, once", flush=True)
        with ThreadPool(os.cpu_count()) as pool:
            reasons = pool.imap(_wrong_with, (path for path, _ in files), chunksize=64)
            corrupt = {os.path.relpath(path, root): reason for (path, _), reason in zip(files, reasons, strict=True) if reason}
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


def _names(root: Path, purpose: str, files: list[tuple[str, int]]) -> tuple[str, str]:
    """Return what cache files are called after: a hash of the folder and purpose, and one of names, sizes and times of its images."""
    try:
        listing = [f"{Path(p).relative_to(root)} {(s := os.stat(p)).st_size} {s.st_mtime_ns}" for p, _ in files]
    except OSError as error:
        raise DataError(f"{root} must be a folder of images that can be read; got: {error}. Remove that file or give another --data") from error
    return tuple(hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] for lines in ([str(root.resolve()), purpose], listing))


def _read_tree(root: Path, short: int | None, train_size: int, test_size: int, on_corrupt: str = "stop"):
    """Return images, labels, classes and what was left out of an ImageFolder tree, from the cache where it was decoded before.

    The shorter side is resized to ``short`` pixels and the central square cut out; None takes only images that fit.
    """
    train, test, classes, corrupt = list_images(root, on_corrupt)
    place, content = _names(root, f"{short} {train_size} {test_size}", train + test)
    cache = cache_folder()
    arrays = []
    for split, files, size in (("train", train, train_size), ("test", test, test_size)):
        file = cache / f"{place}-{split}-{content}.cache"
        shape = (len(files), size, size, 3)
        images = _read_cache(file, shape)
        if images is None:
            try:
                cache.mkdir(parents=True, exist_ok=True)
                lock = FileLock(cache / f"{place}-{split}.lock").acquire()
            except OSError as error:
                wanted = "the cache of decoded images must be a folder that can be written"
                raise DataError(f"{wanted}; got {cache}: {error.strerror}; set LRPET_CACHE") from error
            with lock:  # of runs started at the same time one decodes, the others wait for it
                images = _read_cache(file, shape)
                if images is None:
                    images = _decode([path for path, _ in files], short, size)
                    with write_whole(file) as out:
                        out.write(images.data)
                        out.write(hashlib.sha256(images.data).digest())
                    for old in set(cache.glob(f"{place}-{split}-*")) - {file}:  # of this folder before its images changed
                        old.unlink(missing_ok=True)
        arrays.append(images)
    (train_x, test_x), (train_y, test_y) = map(torch.from_numpy, arrays), (torch.tensor([y for _, y in part]) for part in (train, test))
    return train_x, train_y, test_x, test_y, classes, corrupt


def _read_cache(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the pixels of a cache file, the SHA-256 of which stands behind them; None where it is missing or, said aloud, damaged."""
    if not file.is_file():
        return None
    content = np.fromfile(file, np.uint8)
    pixels, digest = content[:-32], content[-32:].tobytes()
    if len(pixels) == math.prod(shape) and hashlib.sha256(pixels.data).digest() == digest:
        return pixels.reshape(shape)
    print(f"{file} is damaged; decoding the images again", flush=True)
    file.unlink(missing_ok=True)
    return None


def _list_tree(root: Path) -> tuple[list[tuple[str, int]], list[tuple[str, int]], tuple[str, ...]]:
    """Return the (path, label) pairs of the training and the held-out images, and the classes, after checking the tree.

    Without a folder train/, the folders in ``root`` are the classes, and every fifth image of each, by name, is held out.
    """
    from torchvision.datasets import ImageFolder

    if not root.is_dir():
        raise DataError(f"{root} is no folder; it must hold train/ and test/ (or val/), or a folder a class: give another --data")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    split = (root / "train").is_dir()
    if split != (held_out is not None):
        wanted = "must hold train/ and test/ (or val/), or neither and a folder a class"
        raise DataError(f"{root} {wanted}; unpack the images again or give another --data")
    try:
        train, test = (ImageFolder(folder) for folder in (root / "train", held_out)) if split else (ImageFolder(root), None)
    except FileNotFoundError as error:
        raise DataError(f"{root} has a class without images, or no class: {error}. Unpack it again, or remove the empty folder") from error
    if split and train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"train/ and {held_out.name}/ of {root} hold different classes (only one has {odd[0]!r}); unpack it again")
    if len(train.classes) < 2:
        raise DataError(f"{root} has one class, {train.classes[0]!r}; a classifier needs at least two folders of images")
    if split:
        return train.samples, test.samples, tuple(train.classes)
    place = Counter()  # of an image within its class
    parts = ([], [])
    for path, label in train.samples:
        place[label] += 1
        parts[place[label] % 5 == 0].append((path, label))
    if len({label for _, label in parts[1]}) < len(train.classes):
        raise DataError(f"{root} has a class of fewer than five images, of which none can be held out; add images, or make train/ and val/")
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
        raise DataError(f"{path} cannot be decoded ({error}); replace or remove it, or leave such images out by on_corrupt 'skip'") from error


def central_square(image: Image.Image, short: int, size: int) -> np.ndarray:
    """Resize the shorter side to ``short`` pixels and cut out the central square, (size, size, 3) uint8.

    >>> central_square(Image.new("RGB", (30, 20)), 12, 10).shape
    (10, 10, 3)
    """
    scale = short / min(image.size)
    image = image.resize([max(short, round(edge * scale)) for edge in image.size], Image.Resampling.BILINEAR)
    left, top = ((edge - size) // 2 for edge in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _decode(paths: list[str], short: int | None, size: int) -> np.ndarray:
    """Decode files to (n, size, size, 3) uint8, several at a time: Pillow releases the interpreter lock."""

    def decode(path: str) -> np.ndarray:
        image = open_image(path)
        if short is not None:
            return central_square(image, short, size)
        if image.size != (size, size):
            raise DataError(f"{path} is {image.width}×{image.height} pixels, not {size}×{size}; use dataset='imagefolder' for such images")
        return np.asarray(image)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(decode, paths)))


class Batches:
    """Serves normalized, augmented batches of a data set that lives on the device.

    The order of an epoch and every random crop and flip are drawn at its start on the CPU from (seed, epoch)
    alone: the same on every device, and an epoch can be entered at any step. Where several processes train together each is
    served its part of the same batches, so an epoch can also be entered by another number of them.

    Args:
        data: the images.
        batch_size: images a batch; the last batch of an epoch may be smaller, as in the usual loaders.
        device: where batches are made and served.
        seed: of the run.
        rank, world: which process this is, of how many; it serves every ``world``-th image of a batch, possibly none of the last one.

    >>> x, y = next(Batches(load_data(RunConfig()), 64, "cpu", seed=1).epoch(0))
    >>> x.shape, y.shape
    (torch.Size([64, 3, 8, 8]), torch.Size([64]))
    """

    def __init__(self, data: ImageData, batch_size: int, device: str | torch.device, seed: int, rank: int = 0, world: int = 1):
        self.data, self.batch_size, self.device, self.seed, self.rank, self.world = data, batch_size, torch.device(device), seed, rank, world
        self.labels = data.train_labels.to(self.device)
        self.scale = torch.tensor([1 / (255 * s) for s in data.std], device=self.device)
        self.shift = torch.tensor([m / s for m, s in zip(data.mean, data.std, strict=True)], device=self.device)
        self.steps = -(-len(self.labels) // batch_size)
        self._place()

    def _place(self) -> None:
        """Put the images where batches are made of them."""
        self.test_images, self.test_labels = self.data.test_images.to(self.device), self.data.test_labels.to(self.device)
        self.images, pad = self.data.train_images.to(self.device), self.data.pad
        if pad:
            self.images = F.pad(self.images, (0, 0, pad, pad, pad, pad))  # zeros, in height and width

    def _normalize(self, pixels: Tensor) -> Tensor:
        """Turn (B, H, W, 3) uint8 or float into (B, 3, H, W) float32 in channels_last memory."""
        return (pixels * self.scale - self.shift).permute(0, 3, 1, 2)

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw from (seed, epoch) the order of the images, five uniform numbers for each place in it, and which are mirrored."""
        n, draw = len(self.labels), torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(n, generator=draw)
        numbers = torch.rand(n, 5, generator=draw)
        return order, numbers, (numbers[:, 0] < 0.5) if self.data.flip else torch.zeros(n, dtype=torch.bool)

    def size(self, step: int) -> int:
        """Return how many images the batch of a step (of an epoch, from 0) has in all processes together."""
        return min(self.batch_size, len(self.labels) - step * self.batch_size)

    def _part(self, step: int) -> slice:
        """Return which places in the order of an epoch make up this process's part of the batch of a step."""
        return slice(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)

    def _test_parts(self, batch_size: int) -> list[slice]:
        """Return which held-out images make up each of this process's batches."""
        return [slice(i, i + batch_size * self.world, self.world) for i in range(self.rank, len(self.data.test_labels), batch_size * self.world)]

    def _resample(self, pixels: Tensor, maps: Tensor) -> Tensor:
        """Normalize (B, H, W, 3) uint8 and show of each image what its affine map (B, 2, 3) says: (B, 3, size, size)."""
        size = self.data.image_size
        if not len(pixels):  # affine_grid refuses it
            return self._normalize(pixels[:, :size, :size])
        x = self._normalize(pixels)
        grid = F.affine_grid(maps, [len(x), 3, size, size], align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False).contiguous(memory_format=torch.channels_last)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x (B, 3, H, W) float32, y (B,)) of one epoch, from step ``start`` on."""
        order, numbers, flip = self._draw(epoch)
        if self.data.pad is None:
            maps = _crop_maps(numbers, flip).to(self.device)  # (n, 2, 3)
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
                x = self._resample(self.images[which], maps[part])
            else:
                x = self._normalize(self.images[which[:, None, None], rows[part, :, None], columns[part, None, :]])
            yield x, self.labels[which]

    def test(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the held-out images in order, unaugmented; of several processes each gets its part of them.

        None is 128 images at a time on a CPU, whose caches hold no more of a network's activations, and 1000 elsewhere.
        """
        batch_size = batch_size or (128 if self.device.type == "cpu" else 1000)
        for part in self._test_parts(batch_size):
            yield self._normalize(self.test_images[part]), self.test_labels[part]


def _crop_maps(numbers: Tensor, flip: Tensor) -> Tensor:
    """Turn uniform numbers (n, 5) into affine maps (n, 2, 3): area 8 to 100 %, aspect 3/4 to 4/3, any place."""
    area = 0.08 + 0.92 * numbers[:, 1]
    aspect = torch.exp((numbers[:, 2] * 2 - 1) * np.log(4 / 3))
    width, height = ((area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1))
    x, y = (1 - width) * (2 * numbers[:, 3] - 1), (1 - height) * (2 * numbers[:, 4] - 1)
    zero = torch.zeros_like(x)
    return torch.stack([torch.where(flip, -width, width), zero, x, zero, height, y], dim=1).reshape(-1, 2, 3)
