"""Where annotated images come from: VOC's folders with SBD, COCO's, or scenes made on the fly."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from lrpet.config import RunConfig
from lrpet.data.cache import DataError
from lrpet.data.objects import IGNORED, Annotated, ObjectData
from lrpet.data.pixels import open_image
from lrpet.data.scenes import SCENES, scenes_of
from lrpet.data.sets import MEAN, STD, load_data
from lrpet.data.tree import held_out
from lrpet.paths import data_folder

__all__ = ["VOC_CLASSES", "load_objects"]
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)
GROUND = "background"
VOC_PARTS = {  # task → year and list of the images to train on, and of those to score
    "detection": ((("2007", "trainval"), ("2012", "trainval")), (("2007", "test"),)),
    "segmentation": ((("2012", "train"),), (("2012", "val"),)),
}
SBD = "sbd"  # folder beside VOCdevkit, as torchvision downloads it, with train_noval.txt
SHOWN = 3  # of the boxes that are wrong


def load_objects(config: RunConfig, root: str | Path | None = None) -> ObjectData:
    """Return the annotated images of a configuration.

    ``voc``: for detection trainval of 2007 and of 2012, scored on test of 2007; for segmentation train of
    2012 and what SBD adds to it, scored on val of 2012. ``coco``: train2017 and val2017. Scenes need no
    files but those of CIFAR-10, see :mod:`lrpet.data.scenes`.

    Args:
        config: ``task``, ``dataset``, ``image_size`` and ``validation_fraction`` are read.
        root: folder of ``VOCdevkit``, of COCO's ``annotations``, or of CIFAR-10; None takes ``LRPET_DATA``.

    Raises:
        DataError: a folder, year or list that is missing; an object of no known class; boxes that are outside
            of their image or empty; names the files. Or the weights of a pretrained backbone are not there.

    >>> fields = {"task": "segmentation", "dataset": "digit_scenes", "model": "fcn_resnet8"}
    >>> data = load_objects(RunConfig(**fields))
    >>> len(data.train), data.classes[:3]
    (400, ('background', '0', '1'))
    """
    root = data_folder(root)
    if config.dataset in SCENES:
        data = _scenes(config, root)
    elif root is None or not root.is_dir():
        raise DataError(
            f"{config.dataset} needs the folder of its images: give --data or LRPET_DATA; got {root}"
        )
    else:
        data = (_voc if config.dataset == "voc" else _coco)(config, root)
    if config.pretrained_backbone:
        file = _backbone_file(config, root)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        data = replace(data, backbone=file, fingerprint=data.fingerprint | {"backbone_sha256": digest})
    if not config.validation_fraction:
        return data
    held, rest = (part.tolist() for part in held_out(len(data.train), config.validation_fraction))
    return replace(data, train=Subset(data.train, rest), test=Subset(data.train, held))


def _backbone_file(config: RunConfig, root: Path | None) -> Path:
    name = re.search(r"resnet\d+", config.model)[0]
    found = sorted(
        file for ending in ("pth", "safetensors") for file in (root or Path()).glob(f"{name}*.{ending}")
    )
    if root is None or len(found) != 1:
        raise DataError(
            f"pretrained_backbone needs one file of {name}'s weights in the folder of the data, as "
            f"torchvision's {name}.pth; {root} holds {', '.join(file.name for file in found) or 'none'}"
        )
    return found[0]


def _scenes(config: RunConfig, root: Path | None) -> ObjectData:
    source, *counts = SCENES[config.dataset]
    images = load_data(RunConfig(dataset=source), root)
    train, test = scenes_of(images, counts, config.image_size)
    return ObjectData(
        config.task,
        train,
        test,
        images.classes if config.task == "detection" else (GROUND, *images.classes),
        (0.4,) * 3,
        (0.25,) * 3,
        config.image_size,
        flip=images.flip,
        jitter="scenes",
        fingerprint={"data_train_sha256": train.fingerprint, "data_test_sha256": test.fingerprint},
        workers=False,
    )


@dataclass(frozen=True)
class _Files:
    """Annotated images on the disk."""

    images: list[str]
    annotations: list  # of each image: its objects, or the file of its mask
    read: Callable  # (pixels (3, H, W), annotation) → Annotated

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Annotated:
        pixels = torch.from_numpy(np.array(open_image(self.images[i]))).permute(2, 0, 1)
        return self.read(pixels, self.annotations[i])

    def __add__(self, other: _Files) -> _Files:
        return _Files(self.images + other.images, self.annotations + other.annotations, self.read)

    def fingerprint(self, root: Path) -> str:
        """SHA-256 over name and size of each image, and its boxes or the size of its mask."""
        digest = hashlib.sha256()
        for image, known in zip(self.images, self.annotations, strict=True):
            known = os.stat(known).st_size if isinstance(known, str) else known
            digest.update(f"{os.path.relpath(image, root)} {os.stat(image).st_size} {known}\n".encode())
        return f"files:{digest.hexdigest()}"


def _of_files(config: RunConfig, root: Path, train: _Files, test: _Files, classes: tuple[str, ...]):
    try:
        prints = {
            f"data_{name}_sha256": part.fingerprint(root) for name, part in (("train", train), ("test", test))
        }
    except OSError as error:
        raise DataError(f"{root} lacks an image of its lists: {error}; unpack it again") from error
    look = {"flip": True, "jitter": config.task, "fingerprint": prints, "workers": True}
    return ObjectData(config.task, train, test, classes, MEAN, STD, config.image_size, **look)


def _voc(config: RunConfig, root: Path) -> ObjectData:
    parts = VOC_PARTS[config.task]
    years = sorted({year for part in parts for year, _ in part})
    devkit = root / "VOCdevkit"
    missing = [year for year in years if not (devkit / f"VOC{year}").is_dir()]
    if missing:
        found = ", ".join(sorted(place.name for place in devkit.glob("*"))) or "nothing"
        raise DataError(
            f"{config.task} on voc needs {' and '.join(f'VOCdevkit/VOC{year}' for year in years)}; "
            f"{devkit} holds {found}. Unpack VOC{missing[0]} there too"
        )
    train, test = (_join(_voc_part(config.task, root, *one) for one in part) for part in parts)
    if config.task == "segmentation":
        train += _sbd(root / SBD, {Path(image).stem for image in train.images})
        return _of_files(config, root, train, test, (GROUND, *VOC_CLASSES))
    return _of_files(config, root, train, test, VOC_CLASSES)


def _join(parts: Iterator[_Files]) -> _Files:
    first = next(parts)
    return sum(parts, first)


def _voc_part(task: str, root: Path, year: str, image_set: str) -> _Files:
    from torchvision import datasets

    kind = datasets.VOCDetection if task == "detection" else datasets.VOCSegmentation
    try:
        part = kind(root, year=year, image_set=image_set)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{root}/VOCdevkit/VOC{year} lacks the list {image_set!r} of {task} ({error}); unpack it again, "
            "of 2007 both archives, trainval and test"
        ) from error
    if task == "segmentation":
        return _Files(part.images, part.masks, _with_mask)
    return _Files(part.images, _checked(map(_voc_objects, part.annotations), root), _with_boxes)


def _voc_objects(file: str) -> tuple[str, list[tuple], list[str]]:
    """Return a file of annotations, its objects as (label, x1, y1, x2, y2, difficult), and what is wrong."""
    try:
        tree = ET.parse(file).getroot()
        width, height = (int(tree.findtext(f"size/{edge}")) for edge in ("width", "height"))
        found = [
            (
                node.findtext("name"),
                *(float(node.findtext(f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax")),
                node.findtext("difficult", "0").strip() == "1",
            )
            for node in tree.iterfind("object")
        ]
    except (OSError, ET.ParseError, TypeError, ValueError) as error:
        raise DataError(f"{file} is no annotation of VOC ({error}); unpack it again") from error
    unknown = next((name for name, *_ in found if name not in VOC_CLASSES), None)
    if unknown is not None:
        raise DataError(
            f"{file} has an object of class {unknown!r}, for which the network has no output: it knows "
            f"{', '.join(VOC_CLASSES)}. Rename it, or bring the images in COCO's form, with its own classes"
        )
    # VOC counts pixels from 1, and the far edge as part of the box
    objects = [
        (VOC_CLASSES.index(name), x1 - 1, y1 - 1, x2, y2, difficult)
        for name, x1, y1, x2, y2, difficult in found
    ]
    return file, objects, _wrong_boxes(objects, width, height)


def _wrong_boxes(objects: list[tuple], width: float, height: float, slack: float = 0.0) -> list[str]:
    """Say which boxes are empty or leave their image by more than ``slack`` pixels."""
    return [
        f"{[x1, y1, x2, y2]} in an image of {width:g} × {height:g} pixels"
        for _, x1, y1, x2, y2, _ in objects
        if not (-slack <= x1 < x2 <= width + slack and -slack <= y1 < y2 <= height + slack)
    ]


def _checked(read: Iterator[tuple[str, list[tuple], list[str]]], root: Path) -> list[list[tuple]]:
    """Return the objects of each image; refuse boxes that are wrong, all at once."""
    annotations, wrong = [], []
    for name, objects, faults in read:
        annotations.append(objects)
        wrong += [f"{name}: {fault}" for fault in faults]
    if wrong:
        raise DataError(
            f"{root} has {len(wrong)} boxes that are empty or outside of their image, as x1, y1, x2, y2: "
            f"{'; '.join(wrong[:SHOWN])}. Mend or delete these annotations"
        )
    return annotations


def _with_boxes(pixels: Tensor, objects: Sequence[tuple]) -> Annotated:
    table = torch.tensor(objects, dtype=torch.float32).view(-1, 6)
    return Annotated(pixels, table[:, 1:5], table[:, 0].long(), table[:, 5].bool())


def _with_mask(pixels: Tensor, file: str) -> Annotated:
    classes = 1 + len(VOC_CLASSES)
    try:
        mask = torch.from_numpy(_labels(file)).long()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no mask that can be read ({error}); unpack it again") from error
    odd = mask[(mask >= classes) & (mask != IGNORED)]
    if len(odd) or mask.shape != pixels.shape[1:]:
        wrong = f"labels up to {odd.max()}" if len(odd) else f"the shape {tuple(mask.shape)}"
        raise DataError(
            f"{file} must hold labels from 0 to {classes - 1}, or {IGNORED} for pixels to ignore, one for "
            f"each pixel of its image of {tuple(pixels.shape[1:])}; got {wrong}. Mend or remove it"
        )
    empty = torch.zeros(0)
    return Annotated(pixels, empty.view(0, 4), empty.long(), empty.bool(), mask)


def _labels(file: str) -> np.ndarray:
    if file.endswith(".png"):
        with Image.open(file) as image:
            return np.array(image)
    from scipy.io import loadmat

    return loadmat(file)["GTcls"][0]["Segmentation"][0]  # of SBD


def _sbd(place: Path, known: set[str]) -> _Files:
    """Return the images of SBD that are in neither list of VOC 2012."""
    from torchvision.datasets import SBDataset

    try:
        part = SBDataset(place, image_set="train_noval", mode="segmentation")
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"segmentation on voc needs SBD too: {place} must hold img/, cls/ and train_noval.txt ({error}); "
            "get it by torchvision.datasets.SBDataset"
        ) from error
    pairs = [pair for pair in zip(part.images, part.masks, strict=True) if Path(pair[0]).stem not in known]
    images, masks = map(list, zip(*pairs, strict=True)) if pairs else ([], [])
    return _Files(images, masks, _with_mask)


def _coco(config: RunConfig, root: Path) -> ObjectData:
    if config.task != "detection":
        raise DataError(f"coco has boxes here, not masks; got task={config.task!r}: take voc or scenes")
    (train, names), (test, others) = (_coco_part(root, f"{split}2017") for split in ("train", "val"))
    if names != others:
        odd = ", ".join(sorted(set(others) ^ set(names))[:5]) or "their order"
        raise DataError(
            f"both lists of {root}/annotations must have the same categories; they differ in {odd}"
        )
    return _of_files(config, root, train, test, names)


def _coco_part(root: Path, split: str) -> tuple[_Files, tuple[str, ...]]:
    from torchvision.datasets import CocoDetection

    file = root / "annotations" / f"instances_{split}.json"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress
            part = CocoDetection(root / split, str(file))
        index = {number: i for i, number in enumerate(sorted(part.coco.cats))}
        images = [part.coco.imgs[number] for number in part.ids]
        found = [part.coco.imgToAnns[number] for number in part.ids]
        files = [str(root / split / image["file_name"]) for image in images]
        objects = _checked(map(partial(_coco_objects, file, index), images, found), root)
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{root} must hold {split}/ and annotations/{file.name} in COCO's form; got {error!r}; "
            "unpack it again"
        ) from error
    return _Files(files, objects, _with_boxes), tuple(part.coco.cats[number]["name"] for number in index)


def _coco_objects(file: Path, index: dict, image: dict, found: list) -> tuple[str, list[tuple], list[str]]:
    """Return name, objects and wrong boxes of an image, as :func:`_voc_objects`; COCO's boxes are rounded."""
    for one in found:
        if one["category_id"] not in index:
            raise DataError(
                f"annotation {one['id']} in {file} has category {one['category_id']}, for which the network "
                "has no output: the file does not list it. Add it to the categories, or delete the annotation"
            )
    objects = []
    for one in found:
        x, y, width, height = one["bbox"]
        objects.append((index[one["category_id"]], x, y, x + width, y + height, bool(one.get("iscrowd"))))
    name = f"{file.name}, {image['file_name']}"
    return name, objects, _wrong_boxes(objects, image["width"], image["height"], slack=1.0)
