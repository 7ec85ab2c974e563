"""Networks of one latency: what is to be trained where accuracy at equal measured time is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from lrpet.bench.deployed import COMPILED
from lrpet.bench.latency import choice_of, take_spectra
from lrpet.bench.runtimes import below_full
from lrpet.config import RunConfig
from lrpet.deploy.latency import ranks_for_latency
from lrpet.deploy.meters import Choice, Meter, make_meter
from lrpet.lowrank.batchnorm import fold_batchnorm
from lrpet.lowrank.layers import resolve_unfolding
from lrpet.lowrank.ranks import ranks_from_ratio
from lrpet.lowrank.timing import side_by_side
from lrpet.methods.base import build_network
from lrpet.models import build_model
from lrpet.paths import results_root
from lrpet.training.recording import load_spectra

__all__ = ["bench_equal_latency"]
RATIOS = (0.3, 0.95)  # between which a ratio is looked for
STEPS = 6  # of the bisection, to a hundredth


def bench_equal_latency(
    speedup: float = 2.0,
    runtime: str = "openvino",
    device: str = "cpu",
    threads: int = 1,
    spectra_of: str = "imagenette/runs/imagefolder-resnet18-dense-s1-5dd5e7",
    rounds: int = 51,
    seconds: float = 20,
) -> dict:
    """Find three ResNet-18 of ten classes that run in the same time at 64 pixels, batch 1.

    "by latency" has the ranks that :func:`lrpet.ranks_for_latency` allocates; "uniform" one ratio for all
    layers, at multiples of 16; "narrow" fewer channels. The ratios of the latter two are found by bisection
    on the measured speed-up. All are then measured together with the dense network.

    Args:
        speedup: times as fast as dense, of all three.
        runtime: "openvino" or "onnxruntime".
        device: "cpu".
        threads: of one inference.
        spectra_of: folder of the dense run whose last singular values decide the allocation, among the
            results.
        rounds: timed repetitions at the end; fewer, but two at least, where they take longer than
            ``seconds``.
        seconds: see ``rounds``.

    Returns:
        ``rows``: one per way, with ``settings``, the fields of :class:`lrpet.RunConfig` with which it is
        trained, ``milliseconds`` and ``speedup`` as measured at the end, and ``n``.

    Raises:
        ValueError: the speed-up cannot be reached, or another device or runtime.
        ImportError: a package of the extra ``deploy`` is missing.
    """
    if device != "cpu" or runtime not in COMPILED:
        raise ValueError(
            f"device must be cpu, runtime one of {', '.join(COMPILED)}; got {device!r}, {runtime!r}"
        )
    torch.manual_seed(0)
    network = build_model("resnet18", num_classes=10).eval()
    take_spectra(network, load_spectra(results_root() / spectra_of))
    x = torch.randn(1, 3, 64, 64)
    plan = ranks_for_latency(network, x, speedup, runtime, threads=threads)
    settings = {"by latency": {"ranks": plan.ranks, "unfolding": plan.unfolding}}
    dense = make_meter(runtime, fold_batchnorm(network), x, list(ranks_from_ratio(network, 0.5)), threads)

    def uniform(ratio: float) -> tuple[Meter, Choice]:
        return dense, _uniform(network, ratio)

    def narrow(ratio: float) -> tuple[Meter, Choice]:
        config = RunConfig(
            dataset="imagefolder", image_size=64, model="resnet18", method="narrow", prune_ratio=ratio
        )
        return make_meter(runtime, fold_batchnorm(build_network(config).eval()), x, [], threads), {}

    ratios = {
        way: _ratio(make, dense, plan.measured)
        for way, make in {"uniform": uniform, "narrow": narrow}.items()
    }
    settings["uniform"] = {"prune_ratio": ratios["uniform"], "multiple_of": 16}
    settings["narrow"] = {"method": "narrow", "prune_ratio": ratios["narrow"]}
    meter, choice = narrow(ratios["narrow"])
    tasks = {"dense": dense.task({}), "by latency": dense.task(choice_of(plan))}
    tasks |= {"uniform": dense.task(_uniform(network, ratios["uniform"])), "narrow": meter.task(choice)}
    timings = side_by_side(tasks, rounds, x.device, seconds=seconds)
    rows = [
        {"way": way, "settings": settings.get(way, {"method": "dense"}), "n": timing["n"]}
        | {"milliseconds": 1e3 * timing["median_seconds"], "speedup": 1 / timing["ratio_to_first"]}
        for way, timing in timings.items()
    ]
    return {"rows": rows, "runtime": runtime, "asked": speedup, "inference_threads": threads}


def _uniform(network: nn.Module, ratio: float) -> Choice:
    """Return the ranks of one ratio at multiples of 16, without the layers whose factors save nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of layers that stay dense
        ranks = ranks_from_ratio(network, ratio, multiple_of=16)
    return below_full(network, ranks, resolve_unfolding(network, "rows"))


def _ratio(make: Callable[[float], tuple[Meter, Choice]], dense: Meter, speedup: float) -> float:
    """Return the ratio, to a hundredth, whose measured speed-up comes closest to one."""
    (low, high), tried = RATIOS, {}
    for _ in range(STEPS):
        ratio = round((low + high) / 2, 2)
        meter, choice = make(ratio)
        timings = side_by_side(
            {"dense": dense.task({}), "so": meter.task(choice)}, 25, dense.device, seconds=10
        )
        tried[ratio] = 1 / timings["so"]["ratio_to_first"]
        low, high = (ratio, high) if tried[ratio] < speedup else (low, ratio)
    return min(tried, key=lambda ratio: abs(tried[ratio] - speedup))
