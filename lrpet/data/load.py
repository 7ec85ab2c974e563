"""Images in memory where they fit, else streamed from the disk; text in memory."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

from lrpet.config import RunConfig
from lrpet.data.batches import Batches
from lrpet.data.objects import ObjectBatches, ObjectData
from lrpet.data.sets import ImageData, load_data, stored_side
from lrpet.data.stream import StreamBatches, StreamData
from lrpet.data.text import TextBatches, TextData, load_text
from lrpet.data.tree import held_out, list_images
from lrpet.paths import data_folder

__all__ = ["fits_in_memory", "load_images", "make_batches"]


def fits_in_memory(nbytes: int, device: torch.device) -> bool:
    """Tell whether decoded images may be kept: in less than half of the memory free here and on the device.

    >>> fits_in_memory(1, torch.device("cpu")), fits_in_memory(10**15, torch.device("cpu"))
    (True, False)
    """
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each of a torchrun keeps its own
    return nbytes < free / 2 / processes


def load_images(
    config: RunConfig,
    root: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    streamed: bool | None = None,
) -> ImageData | StreamData | ObjectData | TextData:
    """Load the data of a configuration into memory, or only the names of its image files, to be streamed.

    Images with boxes or masks are decoded, or made, when they are asked for.

    With ``crops="whole"`` images are streamed. With "square" they are where they do not fit into memory,
    which changes no bit of a training batch.

    Args:
        config: what :func:`lrpet.data.sets.load_data` reads.
        root: folder of the images; None takes ``LRPET_DATA``.
        device: where batches will be made.
        streamed: how a run to be resumed was begun; None decides by :func:`fits_in_memory`.

    Raises:
        DataError: missing, incomplete or damaged data.

    >>> type(load_images(RunConfig())).__name__
    'ImageData'
    """
    if config.task == "language":
        return load_text(config, root)
    if config.task in ("detection", "segmentation"):
        from lrpet.data.object_sets import load_objects

        return load_objects(config, root)
    if config.dataset != "imagefolder":
        return load_data(config, root)
    folder, size = data_folder(root), config.image_size
    train, test, classes = list_images(folder)
    if config.crops is None:
        nbytes = 3 * (len(train) * stored_side(size) ** 2 + len(test) * size**2)
        if streamed is None:
            streamed = not fits_in_memory(nbytes, torch.device(device))
        if not streamed:
            return load_data(config, folder)
    if config.validation_fraction:
        held, rest = held_out(len(train), config.validation_fraction)
        train, test = [train[i] for i in rest], [train[i] for i in held]
    (train_x, train_y), (test_x, test_y) = (
        ([path for path, _ in part], torch.tensor([y for _, y in part])) for part in (train, test)
    )
    return StreamData(folder, train_x, train_y, test_x, test_y, classes, size, config.crops or "square")


def make_batches(
    data: ImageData | StreamData | ObjectData | TextData,
    batch_size: int,
    device: str | torch.device,
    seed: int,
    rank: int = 0,
    world: int = 1,
    **augmentation: int | bool,
) -> Batches | ObjectBatches | TextBatches:
    """Return what serves the batches of a data set; see :class:`lrpet.data.batches.Batches`."""
    kinds = {StreamData: StreamBatches, ObjectData: ObjectBatches, TextData: TextBatches}
    kind = kinds.get(type(data), Batches)
    return kind(data, batch_size, device, seed, rank, world, **augmentation)
