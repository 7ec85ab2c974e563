"""How many images a network takes at a time, and whether its BatchNorms have enough of them."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lrpet.data.batches import Batches

__all__ = ["check_pieces", "count_pieces"]


def count_pieces(images: int, at_a_time: int) -> int:
    """Return in how many pieces, as equal as can be, a part of a batch is taken; one if it holds no image.

    >>> count_pieces(7, 3), count_pieces(0, 3)
    (3, 1)
    """
    return max(1, -(-images // at_a_time))


def check_pieces(model: nn.Module, batches: Batches, world: int = 1, device_batch: int | None = None) -> None:
    """Refuse batches of which some process would take one image alone, where a BatchNorm could not use it.

    That is where a BatchNorm sees 1×1 pixels: one value a channel has no variance, and PyTorch stops when it
    comes to it, which may be the last batch of an epoch. The model is run once, without training, if there is
    such a piece at all.

    Args:
        model: on the device of ``batches``; its mode is restored.
        batches: what it is trained on.
        world: processes that share a batch.
        device_batch: images that are taken at a time; None: a process's part of a batch.

    Raises:
        ValueError: names the batch size, the layer and what to do.
    """
    images, batch_size = batches.served, batches.batch_size
    if _fewest(images, batch_size, world, device_batch) > 1:
        return
    layer = _sees_one_value(model, batches, world)
    if layer is None:
        return
    near = chain.from_iterable((batch_size + d, batch_size - d) for d in range(1, images + batch_size))
    other = next((b for b in near if b > 1 and _fewest(images, b, world, device_batch) > 1), None)
    advice = [f"batch_size {other}"] * (other is not None) + ["a larger image_size"]
    advice += ["another device_batch (--device-batch)"] * (device_batch is not None)
    advice += ["another number of processes"] * (world > 1)
    raise ValueError(
        f"batch_size {batch_size} of {images} images would have "
        f"{f'one of {world} processes' if world > 1 else 'the network'} take one image alone, of which the "
        f"BatchNorm {layer!r} sees 1×1 pixels: one value has no variance; give {' or '.join(advice)}"
    )


def _fewest(images: int, batch_size: int, world: int, device_batch: int | None) -> int:
    """Return the fewest images that some process takes at a time in an epoch."""
    batches = {min(batch_size, images), images % batch_size} - {0}
    parts = {-(-(batch - rank) // world) for batch in batches for rank in range(min(world, batch))}
    return min(part // count_pieces(part, device_batch or batch_size) for part in parts)


@torch.no_grad()
def _sees_one_value(model: nn.Module, batches: Batches, world: int) -> str | None:
    """Return the name of the first BatchNorm that one image gives one value a channel."""
    found, size, was_training = [], batches.data.image_size, model.training

    def look(name: str):
        return lambda module, given: found.append(name) if given[0].numel() == given[0].shape[1] else None

    hooks = [
        module.register_forward_pre_hook(look(name))
        for name, module in model.named_modules()
        # which sees the images of all processes
        if isinstance(module, _BatchNorm) and not (isinstance(module, nn.SyncBatchNorm) and world > 1)
    ]
    try:
        model.eval()(torch.zeros(1, 3, size, size, device=batches.device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
