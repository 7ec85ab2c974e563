"""Images a second of loading alone, of training alone, and of both, so that a user sees which of the two to make faster."""

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
from lrpet.methods import make_method
from lrpet.methods.base import build_network
from lrpet.paths import results_root
from lrpet.training.recipes import learning_rate, make_mixer, make_optimizer, set_learning_rate
from lrpet.training.step import Step

__all__ = ["keep", "measure", "throughput_line"]


def measure(config: RunConfig, batches: Batches, seconds: float = 1.0) -> dict:
    """Measure how fast batches are served and trained on, with a network of its own that is thrown away.

    Loading alone includes decoding, transfer and augmentation; training alone repeats one batch; projections and evaluation are
    left out. The first batches of each are not timed.

    Args:
        config: of the run.
        batches: its data.
        seconds: of each of the three measurements, at least three batches each and one of every worker.

    Returns:
        ``loading_images_per_second``, ``training_images_per_second``, ``both_images_per_second``, ``workers`` and ``batch_size``.

    >>> from lrpet.data.sets import load_data
    >>> result = measure(RunConfig(), Batches(load_data(RunConfig()), 64, "cpu", 1), seconds=0.01)
    >>> 0 < result["both_images_per_second"]
    True
    """
    device = batches.device
    method = make_method(
        build_network(config, len(batches.data.classes)).to(device, memory_format=torch.channels_last), config
    )
    method.model.train()
    optimizer, mix = (
        make_optimizer(config, method.model, device, method.undecayed),
        make_mixer(config, len(batches.data.classes)),
    )

    set_learning_rate(optimizer, learning_rate(config, 0), device)
    trainer = Step(
        config,
        method.model,
        optimizer,
        torch.zeros(3, dtype=torch.float64, device=device),
        graphs=device.type == "cuda",
    )

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
        while (
            count < 3 or count % max(1, workers) or time.perf_counter() - began < seconds
        ):  # workers end their batches in bursts
            x, y = next(served)
            work(x, y)
            count, images = count + 1, images + len(y)
        wait()
        return images / (time.perf_counter() - began)

    workers = batches.loader.num_workers if isinstance(batches, StreamBatches) else 0
    epochs = lambda: itertools.chain.from_iterable(batches.epoch(epoch) for epoch in itertools.count())
    endless = lambda: (
        batch for batch in epochs() if len(batch[1])
    )  # one of several processes may get none of a last batch
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

    >>> rates = {"loading_images_per_second": 900.0, "training_images_per_second": 300.0, "both_images_per_second": 290.0}
    >>> throughput_line(rates | {"workers": 8})
    'loading alone 900 images/s (8 workers), training alone 300, both 290: training is the bottleneck'
    """
    loading, training, both = (
        result[f"{name}_images_per_second"] for name in ("loading", "training", "both")
    )
    workers = f"{result['workers']} workers" if result["workers"] else "from memory"
    slower = "loading" if loading < training else "training"
    return f"loading alone {loading:.0f} images/s ({workers}), training alone {training:.0f}, both {both:.0f}: {slower} is the bottleneck"


def keep(config: RunConfig, result: dict, origin: dict) -> Path:
    """Write a measurement to ``results/bench``, with what was measured and where, and return the file."""
    device = "-".join(origin["device"].split()).replace("/", "-")
    path = (
        results_root()
        / "bench"
        / f"throughput-{config.model}-{config.method}-{config.image_size}-{device}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": "throughput",
        "model": config.model,
        "method": config.method,
        "image_size": config.image_size,
        **result,
        **origin,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path
