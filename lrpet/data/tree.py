"""Trees of images: a folder per class, in train/ and in one of val/ and test/, or without these.

Splits are known by a word of their names in any case (:data:`SPLITS`), as in ``Training`` or ``seg_test``,
and by holding folders, not images. Where both val/ and test/ hold classes, or folders of other names look
like splits, the tree is refused: it does not say what is to be scored. What is left out is told in one
warning: files that are no images (:data:`IMAGES`), images in no class, folders of images beside the splits.
Names that begin with a dot are not looked at. Links lead to images or whole classes elsewhere, never to what
is in the tree.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lrpet.data.cache import DataError

__all__ = ["held_out", "list_images"]
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
SPLITS = {  # of which images train, and which may be scored
    "train": {"train", "training", "trainset", "trainval"},
    "val": {"val", "valid", "validation", "valset", "dev"},
    "test": {"test", "testing", "testset", "eval", "evaluation"},
}
LITTER = {"thumbs.db", "desktop.ini", "__macosx"}  # what Windows and macOS leave in folders and archives
SHAPE = "train/ and test/ (or val/), in each a folder per class, or one folder per class"
Samples = list[tuple[str, int]]  # path and label of each image


def held_out(count: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Return which of ``count`` training images are held out and which are left, the same for every seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    cut = round(fraction * count)
    if not 0 < cut < count:
        raise DataError(
            f"validation_fraction {fraction} of {count} training images leaves one side empty; choose another"
        )
    return order[:cut], order[cut:]


def list_images(root: Path | None) -> tuple[Samples, Samples, tuple[str, ...]]:
    """Return (path, label) of the training and of the held-out images of a tree, and its classes.

    Where no folder of held-out classes is there (only classes, or a test/ of images without classes), every
    fifth image of each class, by name, is held out.

    Args:
        root: folder with train/ and val/ (or test/), or with one folder per class.

    Raises:
        DataError: no tree of images, one that cannot be read, or one that can be read in two ways.

    Warns:
        UserWarning: how many files and which folders are left out.
    """
    if root is None:
        raise DataError(
            "dataset 'imagefolder' needs a folder with train/ and val/ (or test/): "
            "give it by --data or LRPET_DATA"
        )
    if not root.is_dir():
        raise DataError(f"{root} is no folder; it must hold {SHAPE}: give another --data")
    tree = _Tree(root)
    try:
        train, scored = _splits(tree)
        samples, classes = tree.samples(train)
        held, others = tree.samples(scored) if scored else (None, classes)
    except OSError as error:
        raise DataError(
            f"{root} must be a folder of images that can be read; got: {error}. "
            "Allow reading or give another --data"
        ) from error
    if classes != others:
        odd = sorted(set(classes) ^ set(others))
        raise DataError(
            f"{train.name}/ and {scored.name}/ of {root} hold different classes (only one has {odd[0]!r}); "
            "unpack it again"
        )
    tree.tell()
    if held is None:
        samples, held = _every_fifth(root, samples, len(classes))
    return samples, held, classes


@dataclass(frozen=True)
class _Content:
    """The names in a folder, sorted: of folders, of images, and of other files."""

    folders: list[str]
    images: list[str]
    others: list[str]


class _Tree:
    """The folders of a tree as they are looked at, each once, and what of them is left out."""

    def __init__(self, root: Path):
        self.root = root
        self.contents: dict[Path, _Content] = {}
        self.real: dict[str, str] = {}  # where a folder or a linked image really lies → its place in the tree
        self.links: list[str] = []  # images that are links
        self.left_out, self.notes = Counter(), []  # files by what they are; folders

    def look(self, folder: Path) -> _Content:
        """Return what is in a folder; refuse one that is in the tree twice."""
        if folder not in self.contents:
            self._once(os.path.realpath(folder), str(folder))
            content = _Content([], [], [])
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if not entry.name.startswith(".") and entry.name.casefold() not in LITTER:
                        self._kind(entry, content).append(entry.name)
            self.contents[folder] = content
        return self.contents[folder]

    def _kind(self, entry: os.DirEntry, content: _Content) -> list[str]:
        if entry.is_dir():
            return content.folders
        if not entry.name.lower().endswith(IMAGES):
            return content.others
        if entry.is_symlink():
            entry.stat()  # a link to nowhere is an error here, not in the middle of training
            self.links.append(entry.path)
        return content.images if entry.is_file() else content.others

    def _once(self, real: str, place: str) -> None:
        first = self.real.setdefault(real, place)
        if first != place:
            raise DataError(
                f"{place} and {first} are the same by a link; remove the link: its images count once"
            )

    def samples(self, split: Path) -> tuple[Samples, tuple[str, ...]]:
        """Return (path, label) of the images of a folder of classes, and the classes."""
        content, samples = self.look(split), []
        if not content.folders:
            raise DataError(
                f"{split} has no class, or a class without images: it holds no folder. "
                f"{self.root} must hold {SHAPE}; unpack it again"
            )
        if split != self.root:
            self._leave_out(content.others)
        self.left_out["images in no class"] += len(content.images)
        for label, name in enumerate(content.folders):
            images = self._below(split / name)
            if not images:
                raise DataError(
                    f"{self.root} has a class without images: {split / name} holds none "
                    f"({', '.join(IMAGES)}). Unpack it again, or remove the empty folder"
                )
            samples += [(path, label) for path in images]
        for link in self.links:
            real = os.path.realpath(link)
            self._once(real, link)
            if os.path.dirname(real) in self.real:
                raise DataError(f"{link} is a link to {real}, which is in the tree itself; remove the link")
        if len(content.folders) < 2:
            raise DataError(self._one_class(split, content.folders[0]))
        return samples, tuple(os.fsencode(name).decode(errors="backslashreplace") for name in content.folders)

    def _below(self, folder: Path) -> list[str]:
        """Return the images of a class, in whatever folders."""
        found, images = [folder], []
        for place in found:  # grows
            content = self.look(place)
            for name in content.folders:
                if (place / name).is_symlink():
                    raise DataError(
                        f"{place / name} is a link to a folder inside a class; put its images here instead"
                    )
            found += [place / name for name in content.folders]
            self._leave_out(content.others)
        for place in sorted(map(str, found)):
            images += [os.path.join(place, name) for name in self.contents[Path(place)].images]
        return images

    def _leave_out(self, names: list[str]) -> None:
        self.left_out.update(Path(name).suffix.lower() or "no suffix" for name in names)

    def _one_class(self, split: Path, name: str) -> str:
        text = f"{self.root} has one class, {name!r}; a classifier needs at least two folders of images"
        return f"{text}; did you mean {split / name}?" if self.look(split / name).folders else text

    def tell(self) -> None:
        """Warn of all that was left out."""
        kinds = [f"{kind}: {count}" for kind, count in sorted(self.left_out.items()) if count]
        if kinds:
            files = (
                f"{sum(self.left_out.values())} files ({', '.join(kinds)}), which are no images of a class"
            )
            self.notes.append(files)
        if self.notes:
            told = f"{self.root}: left out are {'; '.join(self.notes)}. Images end with {', '.join(IMAGES)}"
            warnings.warn(told, stacklevel=2)


def _split_of(name: str) -> str | None:
    """Return which split a folder of this name would be.

    >>> _split_of("Seg_Train"), _split_of("bus")
    ('train', None)
    """
    words = set(re.split("[^a-z]+", name.casefold()))
    return next((split for split, known in SPLITS.items() if words & known), None)


def _splits(tree: _Tree) -> tuple[Path, Path | None]:
    """Return the folder of classes to train on, and that of the ones to score, where there is one."""
    root, named = tree.root, {}
    for name in tree.look(tree.root).folders:
        if _split_of(name):
            content = tree.look(root / name)
            flat = bool(content.images) and not content.folders
            named.setdefault((_split_of(name), flat), []).append(name)
    train, val, test = (named.get((split, False), []) for split in SPLITS)
    scored = [name for name in val + test if tree.look(root / name).folders] or val + test
    flat = [name for (_, without_classes), names in named.items() if without_classes for name in names]
    if not train + scored:
        if len({_split_of(name) for name in flat}) > 1:
            raise DataError(
                f"{flat[0]}/ of {root} holds images, but no folder per class; it must hold {SHAPE}"
            )
        _refuse_hidden_splits(tree)
        return root, None
    if len(train) > 1 or len(scored) > 1:
        names = " and ".join(f"{name}/" for name in (train if len(train) > 1 else scored))
        raise DataError(
            f"{root} holds {names}, and it is not clear which is to be "
            f"{'trained on' if len(train) > 1 else 'scored'}; move the others away, "
            "or let their names begin with a dot, which leaves them out"
        )
    if not train or not (scored or flat):
        raise DataError(
            f"{root} must hold {SHAPE}; got one of two: unpack the images again or give another --data"
        )
    beside = [name for name in tree.look(root).folders if name not in train + scored and _shows(root / name)]
    tree.notes += [f"{name}/" + " (images without classes)" * (name in flat) for name in beside]
    tree.left_out["images in no class"] += len(tree.look(root).images)
    return _inner(tree, root / train[0]), _inner(tree, root / scored[0]) if scored else None


def _shows(folder: Path) -> bool:
    return any(name.lower().endswith(IMAGES) for _, _, names in os.walk(folder) for name in names)


def _inner(tree: _Tree, split: Path) -> Path:
    """Return the folder of classes of a split: some archives have it twice, as seg_train/seg_train."""
    content = tree.look(split)
    while len(content.folders) == 1 and _split_of(content.folders[0]) == _split_of(split.name):
        split = split / content.folders[0]
        content = tree.look(split)
    return split


def _refuse_hidden_splits(tree: _Tree) -> None:
    """Refuse folders that would be classes but hold the same folders each, and no images of their own."""
    contents = [tree.look(tree.root / name) for name in tree.look(tree.root).folders]
    same = len({tuple(content.folders) for content in contents}) == 1
    if len(contents) > 1 and same and len(contents[0].folders) > 1 and not any(c.images for c in contents):
        names = ", ".join(tree.look(tree.root).folders)
        raise DataError(
            f"{names} of {tree.root} look like splits, not classes: each holds {contents[0].folders[0]}/ and "
            "others of the same names. Call them train/ and val/, or move each class into one folder"
        )


def _every_fifth(root: Path, samples: Samples, classes: int) -> tuple[Samples, Samples]:
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
