"""Images per second of loading alone, training alone and both: which of the two to make faster."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lrpet.config import RunConfig
from lrpet.data.batches import Batches
from lrpet.data.stream import StreamBatches
from lrpet.files import write_file
from lrpet.methods import make_method
from lrpet.methods.base import build_network
from lrpet.paths import results_root
from lrpet.training.recipes import learning_rate, make_mixer, make_optimizer, set_learning_rate
from lrpet.training.step import Step

__all__ = ["keep", "measure", "throughput_line"]


def measure(config: RunConfig, batches: Batches, seconds: float = 1.0) -> dict:
    """Measure how fast batches are served and trained on, with a network of its own that is thrown away.

    Loading alone includes decoding, transfer and augmentation; training alone repeats one batch; projections
    and evaluation are left out. The first batches of each are not timed.

    Args:
        config: of the run.
        batches: its data.
        seconds: of each of the three measurements, at least three batches each and one of every worker.

    Returns:
        ``loading_images_per_second``, ``training_images_per_second``, ``both_images_per_second``, ``workers``
        and ``batch_size``.

    >>> from lrpet.data.sets import load_data
    >>> result = measure(RunConfig(), Batches(load_data(RunConfig()), 64, "cpu", 1), seconds=0.01)
    >>> 0 < result["both_images_per_second"]
    True
    """
    device = batches.device
    classes = len(batches.data.classes)
    network = build_network(config, classes).to(device, memory_format=torch.channels_last)
    method, mix = make_method(network, config), make_mixer(config, classes, batches.data.mean)
    method.model.train()
    optimizer = make_optimizer(config, method.model, device, method.undecayed)
    set_learning_rate(optimizer, learning_rate(config, 0), device)
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    trainer = Step(config, method.model, optimizer, totals, graphs=device.type == "cuda")

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        trainer.backward(*mix(x, y), y)
        trainer.update()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def rate(served: Iterator, work: Callable) -> float:
        count = images = 0
        for x, y in itertools.islice(served, max(3, workers)):  # what the workers had ready at the start
            work(x, y)
        wait()
        began = time.perf_counter()
        # workers end their batches in bursts
        while count < 3 or count % max(1, workers) or time.perf_counter() - began < seconds:
            x, y = next(served)
            work(x, y)
            count, images = count + 1, images + len(y)
        wait()
        return images / (time.perf_counter() - began)

    def endless() -> Iterator:
        epochs = itertools.chain.from_iterable(batches.epoch(epoch) for epoch in itertools.count())
        return (batch for batch in epochs if len(batch[1]))  # one of several processes may get no image

    workers = batches.loader.num_workers if isinstance(batches, StreamBatches) else 0
    one = next(batches.epoch(0))
    rates = {
        "loading": rate(endless(), lambda x, y: None),
        "training": rate(itertools.repeat(one), step),
        "both": rate(endless(), step),
    }
    return {
        **{f"{name}_images_per_second": round(value, 1) for name, value in rates.items()},
        "workers": workers,
        "batch_size": len(one[1]),
        "seconds": seconds,
    }


def throughput_line(result: dict) -> str:
    """Return a measurement in one line, with the bottleneck named.

    >>> rates = {"loading": 900.0, "training": 300.0, "both": 290.0}
    >>> throughput_line({f"{name}_images_per_second": rate for name, rate in rates.items()} | {"workers": 8})
    'loading alone 900 images/s (8 workers), training alone 300, both 290: training is the bottleneck'
    """
    loading, training, both = (
        result[f"{name}_images_per_second"] for name in ("loading", "training", "both")
    )
    workers = f"{result['workers']} workers" if result["workers"] else "from memory"
    slower = "loading" if loading < training else "training"
    told = f"loading alone {loading:.0f} images/s ({workers}), training alone {training:.0f}, both {both:.0f}"
    return f"{told}: {slower} is the bottleneck"


def keep(config: RunConfig, result: dict, origin: dict) -> Path:
    """Write a measurement to ``results/bench``, with what was measured and where, and return the file."""
    device = "-".join(origin["device"].split()).replace("/", "-")
    name = f"throughput-{config.model}-{config.method}-{config.image_size}-{device}.json"
    path = results_root() / "bench" / name
    result = {
        "benchmark": "throughput",
        "model": config.model,
        "method": config.method,
        "image_size": config.image_size,
        **result,
        **origin,
    }
    write_file(path, json.dumps(result, indent=1) + "\n")
    return path
