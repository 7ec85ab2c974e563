"""What fewer multiply-adds bring in each runtime of a CPU: dense, compact, and what would be ideal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from lrpet.deploy.meters import Choice, TorchMeter
from lrpet.deploy.programs import (
    LayeredProgram,
    onnxruntime_session,
    onnxruntime_task,
    openvino_program,
    openvino_task,
    quantized,
    require,
)
from lrpet.lowrank.batchnorm import fold_batchnorm
from lrpet.lowrank.budget import ranks_for_budget
from lrpet.lowrank.cost import cost
from lrpet.lowrank.layers import copy_of, matrix_of, resolve_unfolding
from lrpet.lowrank.ranks import ranks_from_ratio
from lrpet.lowrank.timing import side_by_side
from lrpet.models import build_model

__all__ = ["below_full", "bench_runtimes"]
NETWORKS = {  # name → image size in pixels, prune ratio, layers
    "resnet18": (224, 0.6, None),
    "resnet50": (224, 0.6, None),
    "vgg16": (32, 0.6, None),
    "resnet56": (32, 0.57, None),
    "vit": (32, 0.6, "*.mlp.*"),
}
BATCHES, THREADS = (1, 32), (1, 2)


def bench_runtimes(
    networks: str = ",".join(NETWORKS), device: str = "cpu", rounds: int = 51, seconds: float = 2
) -> dict:
    """Compare runtimes, dense and compact, with BatchNorm folded and random weights.

    The variants of a network are "dense"; "compact", at the ranks of its ratio; "aligned", at multiples of 16
    within the same multiply-adds, or where its channels are too few for that, at the ranks of the ratio
    rounded up; and "columns", at the ranks of the ratio by the other unfolding. Each is timed beside the
    others. Eager PyTorch is in channels_last.
    bfloat16 is measured in OpenVINO alone, since ONNX Runtime has it not on a CPU; int8 in ONNX Runtime at
    batch 1, statically quantized by one random input, which tells times and nothing of accuracy; compiled
    networks by :func:`lrpet.bench.inference.bench_inference`, since compiling takes longer than all of this.

    Args:
        networks: names, with commas between.
        device: "cpu".
        rounds: timed repetitions of each; fewer, but two at least, where they take longer than ``seconds``.
        seconds: see ``rounds``; for one setting.

    Returns:
        ``rows``: one per network, runtime, precision, batch, threads and variant: its seconds, ``gain`` over
        dense in the same runtime and precision, ``ideal`` by multiply-adds, and ``share``, gain by ideal.

    Raises:
        ValueError: an unknown network, or another device.
        ImportError: a package of the extra ``deploy`` is missing.
    """
    require("onnx", "onnxscript", "onnxruntime", "openvino", extra="deploy")
    if device != "cpu":
        raise ValueError(f"device must be cpu, on which these runtimes are compared; got {device!r}")
    names = networks.split(",")
    if unknown := [name for name in names if name not in NETWORKS]:
        raise ValueError(f"networks must be of {', '.join(NETWORKS)}; got {unknown[0]!r}")
    rows, before = [], torch.get_num_threads()
    try:
        for name in names:
            rows += _bench_network(name, rounds, seconds)
    finally:
        torch.set_num_threads(before)
    return {"rows": rows}


def _bench_network(name: str, rounds: int, seconds: float) -> list[dict]:
    size, ratio, layers = NETWORKS[name]
    torch.manual_seed(0)
    network = build_model(name).eval()
    choices = _variants(network, size, ratio, layers)
    macs = {variant: _macs(network, choice, size) for variant, choice in choices.items()}
    folded, rows = fold_batchnorm(network), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for batch in BATCHES:
            x = torch.randn(batch, 3, size, size)
            program = LayeredProgram(folded, x, list(choices["compact"]))
            programs = {("fp32", v): program.variant(choice) for v, choice in choices.items()}
            if batch == 1:
                programs |= {("int8", v): quantized(programs["fp32", v], program.feeds) for v in choices}
            for threads in THREADS:
                torch.set_num_threads(threads)
                for where, tasks in _tasks(folded, programs, program.feeds, x, choices, threads):
                    timings = side_by_side(tasks, rounds, x.device, seconds=seconds)
                    for variant, timing in timings.items():
                        gain, ideal = 1 / timing["ratio_to_first"], macs["dense"] / macs[variant]
                        row = {"network": name, **where, "batch": batch, "threads": threads}
                        row |= {"variant": variant, "n": timing["n"], "seconds": timing["median_seconds"]}
                        rows.append(row | {"gain": gain, "ideal": ideal, "share": gain / ideal})
    return rows


def _variants(network: nn.Module, size: int, ratio: float, layers: str | None) -> dict[str, Choice]:
    """Return what is compared, dense first; layers at full rank are in no choice."""
    choices: dict[str, Choice] = {"dense": {}}
    ranks = ranks_from_ratio(network, ratio, include=layers)
    choices["compact"] = below_full(network, ranks, resolve_unfolding(network, "rows"))
    budget = 1 - _macs(network, choices["compact"], size) / _macs(network, {}, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the rows tell what a ratio costs
        try:
            aligned = ranks_for_budget(network, (3, size, size), budget, include=layers, multiple_of=16)
        except ValueError:  # too few channels
            aligned = ranks_from_ratio(network, ratio, include=layers, multiple_of=16)
        choices["aligned"] = below_full(network, aligned, resolve_unfolding(network, "rows"))
        columns = resolve_unfolding(network, "columns")
        if any(columns[name] == "columns" for name in choices["compact"]):  # Linear layers have one matrix
            ranks = ranks_from_ratio(network, ratio, include=layers, unfolding="columns")
            choices["columns"] = below_full(network, ranks, columns)
    return choices


def below_full(network: nn.Module, ranks: Mapping[str, int], unfolding: Mapping[str, str]) -> Choice:
    """Return ranks as a choice, without the layers at full rank, which stay dense."""
    return {
        name: (rank, unfolding[name])
        for name, rank in ranks.items()
        if rank < min(matrix_of(network.get_submodule(name), unfolding[name]).shape)
    }


def _macs(network: nn.Module, choice: Choice, size: int) -> int:
    ranks = {name: rank for name, (rank, _) in choice.items()}
    unfolding = {name: how for name, (_, how) in choice.items()}
    return cost(network, (3, size, size), ranks, unfolding=unfolding).macs


def _tasks(
    folded: nn.Module,
    programs: Mapping[tuple[str, str], bytes],
    feeds: Sequence[np.ndarray],
    x: torch.Tensor,
    choices: Mapping[str, Choice],
    threads: int,
) -> Iterator[tuple[dict, dict]]:
    """Yield each runtime and precision, with the tasks of all variants in it."""
    network = copy_of(folded).to(memory_format=torch.channels_last)
    meter = TorchMeter(network, x.to(memory_format=torch.channels_last), [], threads)
    where = {"runtime": "eager", "precision": "fp32"}
    yield where, {variant: meter.task(choice) for variant, choice in choices.items()}
    for precision in dict.fromkeys(precision for precision, _ in programs):
        sessions = {v: onnxruntime_session(programs[precision, v], threads) for v in choices}
        tasks = {v: onnxruntime_task(session, feeds) for v, session in sessions.items()}
        yield {"runtime": "onnxruntime", "precision": precision}, tasks
    for precision, hint in {"fp32": "f32", "bf16": "bf16"}.items():
        compiled = {v: openvino_program(programs["fp32", v], threads, hint) for v in choices}
        tasks = {v: openvino_task(program, feeds) for v, program in compiled.items()}
        yield {"runtime": "openvino", "precision": precision}, tasks
