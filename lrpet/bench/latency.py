"""Whether ranks for a latency reach it: planned, then measured anew beside the dense network."""

from __future__ import annotations

import pandas as pd
import torch
from torch import nn

from lrpet.deploy.latency import LatencyPlan, OutOfReach, ranks_for_latency
from lrpet.deploy.meters import Choice, make_meter
from lrpet.lowrank.batchnorm import fold_batchnorm
from lrpet.lowrank.ranks import compressible_layers
from lrpet.models import build_model
from lrpet.paths import results_root
from lrpet.training.recording import load_spectra

__all__ = ["bench_latency"]
SPEEDUPS = (1.5, 2.0)


def bench_latency(
    model: str = "resnet18",
    device: str = "cpu",
    runtimes: str = "openvino,onnxruntime,eager",
    threads: int = 1,
    batch: int = 1,
    spectra_of: str = "imagenette/runs/imagefolder-resnet18-dense-s1-5dd5e7",
) -> dict:
    """Plan ranks for speed-ups of 1.5 and 2.0 in each runtime, and measure each plan once more.

    The planned energies are those of weights with the singular values of a trained network, in random
    directions: the store keeps a run's spectra and not its dense weights. Images of 224 pixels.

    Args:
        model: a name of ``build_model``.
        device: "cpu", or "cuda" for eager and compiled networks.
        runtimes: names, with commas between.
        threads: of one inference.
        batch: images of one inference.
        spectra_of: folder of the run whose last singular values are taken, among the results.

    Returns:
        ``rows``: one per runtime and speed-up asked for: ``predicted`` from the profile, ``measured`` by the
        plan, ``again`` measured by this function, ``energy_kept``, ``dense_layers`` left as they are, and
        ``trade``, energy kept at each speed-up, allocated and uniform. Of a speed-up that cannot be reached
        there is ``refused``, which names the largest, in the place of all these.

    Raises:
        ImportError: a package of the extra ``deploy`` is missing.
    """
    torch.manual_seed(0)
    where = torch.device(device)
    network = build_model(model, num_classes=10).to(where).eval()
    take_spectra(network, load_spectra(results_root() / spectra_of))
    x, rows = torch.randn(batch, 3, 224, 224, device=where), []
    for runtime in runtimes.split(","):
        for asked in SPEEDUPS:
            row = {"runtime": runtime, "threads": threads, "batch": batch, "asked": asked}
            rows.append(row)
            try:
                plan = ranks_for_latency(network, x, asked, runtime, threads=threads)
            except OutOfReach as error:
                row["refused"] = str(error)
                continue
            meter = make_meter(runtime, fold_batchnorm(network), x, list(plan.ranks), threads)
            dense, planned = meter.compare([{}, choice_of(plan)])
            row |= {"predicted": plan.predicted, "measured": plan.measured, "again": dense / planned}
            row |= {"energy_kept": plan.energy_kept, "dense_layers": len(plan.layers) - len(plan.ranks)}
            row |= {"layers": len(plan.layers), "trade": plan.trade}
    return {"rows": rows, "spectra_of": spectra_of}


def choice_of(plan: LatencyPlan) -> Choice:
    """Return what a plan makes of each layer, as a meter takes it."""
    return {name: (rank, plan.unfolding[name]) for name, rank in plan.ranks.items()}


@torch.no_grad()
def take_spectra(network: nn.Module, spectra: pd.DataFrame) -> None:
    """Give each layer random directions and the singular values of a table of ``load_spectra``, in place."""
    last = spectra[spectra.epoch == spectra.epoch.max()]
    for name, (N, D) in compressible_layers(network).items():
        s = torch.tensor(last[last.layer == name].s.to_numpy(), dtype=torch.float32)
        if len(s):
            U, _, Vh = torch.linalg.svd(torch.randn(N, D), full_matrices=False)
            weight = network.get_submodule(name).weight
            weight.copy_(((U * s) @ Vh).reshape(weight.shape))
