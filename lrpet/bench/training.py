"""Our training step against a plain PyTorch loop of the usual kind, on images of CIFAR-10's size."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from lrpet.config import RunConfig
from lrpet.data.batches import Batches
from lrpet.data.sets import ImageData, load_data
from lrpet.lowrank.timing import side_by_side
from lrpet.methods.base import Dense
from lrpet.models import build_model
from lrpet.training.evaluate import evaluate
from lrpet.training.loop import Session, train
from lrpet.training.recipes import learning_rate, make_optimizer, set_learning_rate
from lrpet.training.step import Step

__all__ = ["bench_training"]
IMAGES = 50_000  # of CIFAR-10's training set, whose size decides how long an epoch is
SEEDS = (1, 2, 3)


def bench_training(
    model: str = "resnet56",
    batch_size: int = 128,
    device: str = "cpu",
    steps: int = 20,
    rounds: int = 5,
    epochs: int = 20,
) -> dict:
    """Compare the throughput of training here with a plain loop, and what both lead to on a short schedule.

    The plain loop is the usual one: fp32, a DataLoader with two workers that crop and flip one image after
    the other, the loss read at every step. Ours: images on the device and augmented there a batch at a time,
    channels_last, and on a GPU CUDA graphs.

    Args:
        model: a name of ``build_model``.
        batch_size: images per step.
        device: "cpu" or "cuda".
        steps: of SGD that are timed together.
        rounds: timed repetitions of each.
        epochs: of the schedule on the embedded digits (resnet8, batch 64) whose accuracies are compared; 0
            leaves that out.

    Returns:
        ``timings`` of ``steps`` steps of ``plain``, ``ours_fp32`` and ``ours_bf16``; ``images_per_second`` of
        each; ``epoch_seconds``, what an epoch of CIFAR-10 takes at that rate; ``top1_pct``: the accuracies of
        ``plain`` and ``ours_bf16`` on digits, one per seed, last epoch.
    """
    where = torch.device(device)
    draw = torch.Generator().manual_seed(0)
    pixels, labels = (
        torch.randint(256, (2048, 32, 32, 3), dtype=torch.uint8, generator=draw),
        torch.randint(10, (2048,), generator=draw),
    )
    data = ImageData(
        pixels,
        labels,
        pixels[:1],
        labels[:1],
        tuple("0123456789"),
        (0.5,) * 3,
        (0.25,) * 3,
        32,
        pad=4,
        flip=True,
    )
    config = RunConfig(dataset="cifar10", model=model, method="dense", batch_size=batch_size)
    plain = _plain_steps(data, config, where)
    ours = {name: _our_steps(data, replace(config, precision=name), where) for name in ("fp32", "bf16")}
    tasks = {"plain": plain} | {f"ours_{name}": steps_of for name, steps_of in ours.items()}
    timings = side_by_side(
        {name: lambda task=task: _advance(task, steps) for name, task in tasks.items()}, rounds, where
    )
    rate = {name: steps * batch_size / t["median_seconds"] for name, t in timings.items()}
    result = {"batch_size": batch_size, "steps": steps, "timings": timings, "images_per_second": rate}
    result["epoch_seconds"] = {name: IMAGES / r for name, r in rate.items()}
    if epochs:
        result |= {"epochs": epochs, "top1_pct": _accuracies(epochs, where)}
    return result


class _AsImages(Dataset):
    """A data set as torchvision serves it: one PIL image at a time."""

    def __init__(self, data: ImageData):
        augment = [
            transforms.RandomCrop(data.image_size, padding=data.pad),
            *[transforms.RandomHorizontalFlip()] * data.flip,
        ]
        self.transform = transforms.Compose(
            [*augment, transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
        )
        self.images, self.labels = data.train_images.numpy(), data.train_labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def _plain_epoch(
    loader: DataLoader, network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> Iterator[float]:
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        yield loss.item()


def _loader(data: ImageData, config: RunConfig, device: torch.device, workers: int) -> DataLoader:
    more = {"num_workers": workers, "pin_memory": device.type == "cuda", "persistent_workers": workers > 0}
    return DataLoader(_AsImages(data), config.batch_size, shuffle=True, **more)


def _plain_steps(data: ImageData, config: RunConfig, device: torch.device) -> Iterator[float]:
    network = build_model(config.model).to(device).train()
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    loader = _loader(data, config, device, workers=2)
    while True:
        yield from _plain_epoch(loader, network, optimizer, device)


def _our_steps(data: ImageData, config: RunConfig, device: torch.device) -> Iterator[None]:
    network = build_model(config.model).to(device, memory_format=torch.channels_last).train()
    optimizer, totals = (
        make_optimizer(config, network, device),
        torch.zeros(3, dtype=torch.float64, device=device),
    )
    set_learning_rate(optimizer, config.learning_rate, device)
    batches = Batches(data, config.batch_size, device, config.seed)
    step, epoch = Step(config, network, optimizer, totals, graphs=device.type == "cuda"), 0
    while True:
        for x, y in batches.epoch(epoch):
            step.backward(x, y, y)
            step.look()
            step.update()
            yield
        epoch += 1


def _advance(task: Iterator, steps: int) -> None:
    for _ in range(steps):
        next(task)


def _accuracies(epochs: int, device: torch.device) -> dict[str, list[float]]:
    """Return top-1 in percent of dense training on digits, one per seed, by the plain loop and by ours."""
    top1_pct: dict[str, list[float]] = {"plain": [], "ours_bf16": []}
    for seed in SEEDS:
        config = RunConfig(
            method="dense",
            epochs=epochs,
            precision="bf16",
            seed=seed,
        )
        data = load_data(config)
        batches = Batches(data, config.batch_size, device, seed)
        torch.manual_seed(seed)
        network = build_model(config.model).to(device)
        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        loader = _loader(data, config, device, workers=0)
        for epoch in range(epochs):
            set_learning_rate(optimizer, learning_rate(config, epoch), torch.device("cpu"))
            for _ in _plain_epoch(loader, network.train(), optimizer, device):
                pass
        top1_pct["plain"].append(evaluate(network, batches)["top1_pct"])
        torch.manual_seed(seed)
        method = Dense(build_model(config.model).to(device, memory_format=torch.channels_last))
        with tempfile.TemporaryDirectory() as folder:
            session = Session(Path(folder, "checkpoint.pt"), checkpoint_epochs=epochs, progress="off")
            history = train(config, method, batches, session).history
        top1_pct["ours_bf16"].append(history[-1]["top1_pct"])
    return top1_pct
